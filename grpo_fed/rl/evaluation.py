"""Playing episodes without learning, for K stacked clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.records import Evaluation
from grpo_fed.rl.rng import Purpose, env_seeds, generator
from grpo_fed.rl.rollout import NOISE_BLOCK, Actor
from grpo_fed.tasks.envs import ClientEnvs


@dataclass(frozen=True)
class EvaluatedClients:
    """Who plays."""

    names: Sequence[str]
    seeds: Sequence[int]
    normaliser: ObservationNormaliser | None


def evaluate(
    actor: Actor,
    lanes: ClientEnvs,
    players: EvaluatedClients,
    episodes: int,
    step_limit: int,
    deterministic: bool,
    number: int = 0,
) -> list[Evaluation]:
    """`episodes` of every client, in waves of one for each copy, so that long episodes are not left out.

    Which episodes these are depends on the client's seed and on `number` alone.
    """
    clients = len(players.names)
    copies = lanes.size // clients
    waves = -(-episodes // copies)
    scores, lengths = np.zeros((waves, clients, copies)), np.zeros((waves, clients, copies), np.int64)
    for wave in range(waves):
        count = number * 1_000_000 + wave
        seeds = np.concatenate([env_seeds(seed, Purpose.EVALUATION, copies, count) for seed in players.seeds])
        draws = [generator(seed, Purpose.ACTIONS, 2**32 + count) for seed in players.seeds]
        scores[wave], lengths[wave] = _wave(actor, lanes, players.normaliser, seeds, draws, step_limit, deterministic)
    every = scores.transpose(1, 0, 2).reshape(clients, -1)[:, :episodes]
    steps = lengths.transpose(1, 0, 2).reshape(clients, -1)[:, :episodes]
    return [Evaluation(name, deterministic, every[k], steps[k]) for k, name in enumerate(players.names)]


def _wave(
    actor: Actor,
    lanes: ClientEnvs,
    normaliser: ObservationNormaliser | None,
    seeds: np.ndarray,
    draws: Sequence[np.random.Generator],
    step_limit: int,
    deterministic: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """One episode in every lane; scores and lengths, [K, N] each."""
    clients, distribution = len(draws), actor.policy.distribution
    copies = lanes.size // clients
    observations = lanes.reset(seeds)
    awake, scores, lengths = np.ones(lanes.size, bool), np.zeros(lanes.size), np.zeros(lanes.size, np.int64)
    noise = np.zeros(0)
    for t in range(step_limit):
        seen = observations.reshape(clients, copies, -1)
        said = actor(seen if normaliser is None else normaliser.apply(seen))
        if deterministic:
            actions = distribution.mode(said)
        else:
            if t % NOISE_BLOCK == 0:
                noise = np.stack([distribution.draw_noise(draw, (NOISE_BLOCK, copies)) for draw in draws])
            actions = distribution.sample(said, noise[:, t % NOISE_BLOCK])
        step = lanes.step(actions.reshape(lanes.size, -1), restart=False)
        scores += np.where(awake & step.valid, step.rewards, 0.0)
        lengths += awake & step.valid
        if not (np.isfinite(scores.sum()) and np.isfinite(step.observations.sum())):
            _refuse_non_finite(lanes, t, scores, step.observations)
        awake &= ~(step.terminated | step.truncated)
        observations = step.observations
        if not awake.any():
            break
    return scores.reshape(clients, copies), lengths.reshape(clients, copies)


def _refuse_non_finite(lanes: ClientEnvs, t: int, scores: np.ndarray, observations: np.ndarray) -> None:
    """ValueError for the first lane whose score [L] or observation [L, D] is not finite, if there is one."""
    for lane, name in enumerate(lanes.names):
        for what, value in (("reward", scores[lane]), ("observation", observations[lane])):
            if not np.isfinite(value).all():
                text = f"at step {t} of an evaluation episode, the {what} is not finite"
                raise ValueError(f"client {name}: {text}; mend the environment, or put a wrapper around it that does")
