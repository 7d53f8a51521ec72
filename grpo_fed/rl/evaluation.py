"""Episodes without learning, for K stacked clients with N copies of their environments each; L = K * N copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_fed.rl.actor import Actor
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.records import Evaluation
from grpo_fed.rl.recurrence import with_memory
from grpo_fed.rl.rng import Purpose, env_seeds, generator
from grpo_fed.rl.rollout import NOISE_BLOCK
from grpo_fed.tasks.envs import ClientEnvs

ACTION_STREAMS = {Purpose.EVALUATION: 1, Purpose.COMPARISON: 2, Purpose.ROLLBACK: 3}
"""Where the numbers of actions' streams begin, in steps of 2**32; those of training begin at 0."""


@dataclass(frozen=True)
class EvaluatedClients:
    """The clients that are evaluated, [K] each."""

    names: Sequence[str]
    seeds: Sequence[int]
    """Names of their random streams."""
    normaliser: ObservationNormaliser | None
    """Their policies' normaliser, where they have one."""


def evaluate(
    actor: Actor,
    envs: ClientEnvs,
    clients: EvaluatedClients,
    episodes: int,
    step_limit: int,
    deterministic: bool,
    number: int | Sequence[int] = 0,
    purpose: Purpose = Purpose.EVALUATION,
) -> list[Evaluation]:
    """Play `episodes` of every client, in waves of one for each copy, so that long episodes are not left out.

    step_limit: steps after which an episode counts as it is.
    number, purpose: name the episodes, which depend on them and on the client's seed alone; a number for each client,
        or one for all.
    """
    count = len(clients.names)
    copies = envs.size // count
    waves = -(-episodes // copies)
    numbers = [number] * count if isinstance(number, int) else number
    sums = [np.zeros((waves, count, copies)) for _ in range(3)]
    for wave in range(waves):
        streams = [(each, of_client * 1_000_000 + wave) for each, of_client in zip(clients.seeds, numbers, strict=True)]
        seeds = np.concatenate([env_seeds(seed, purpose, copies, stream) for seed, stream in streams])
        first = ACTION_STREAMS[purpose] * 2**32
        draws = [generator(seed, Purpose.ACTIONS, first + stream) for seed, stream in streams]
        played = _play_wave(actor, envs, clients.normaliser, seeds, draws, step_limit, deterministic)
        for whole, of_wave in zip(sums, played, strict=True):
            whole[wave] = of_wave
    scores, lengths, costs = (each.transpose(1, 0, 2).reshape(count, -1)[:, :episodes] for each in sums)
    return [
        Evaluation(
            name, deterministic, scores[k], lengths[k].astype(np.int64), None if envs.cost_key is None else costs[k]
        )
        for k, name in enumerate(clients.names)
    ]


def _play_wave(
    actor: Actor,
    envs: ClientEnvs,
    normaliser: ObservationNormaliser | None,
    seeds: np.ndarray,
    draws: Sequence[np.random.Generator],
    step_limit: int,
    deterministic: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Play one episode in every copy; gives scores, lengths and costs, [K, N] each; no costs are 0."""
    clients, distribution = len(draws), actor.policy.distribution
    copies = envs.size // clients
    observations = envs.reset(seeds)
    running, scores, lengths = np.ones(envs.size, bool), np.zeros(envs.size), np.zeros(envs.size, np.int64)
    costs = np.zeros(envs.size)
    noise = np.zeros(0)
    for t in range(step_limit):
        inputs = observations.reshape(clients, copies, -1)
        inputs = inputs if normaliser is None else normaliser.apply(inputs)
        outputs = actor(with_memory(inputs, actor, begins=t == 0))
        if deterministic:
            actions = distribution.mode(outputs)
        else:
            if t % NOISE_BLOCK == 0:
                noise = np.stack([distribution.draw_noise(draw, (NOISE_BLOCK, copies)) for draw in draws])
            actions = distribution.sample(outputs, noise[:, t % NOISE_BLOCK])
        step = envs.step(actions.reshape(envs.size, -1), restart=False)
        scores += np.where(running & step.valid, step.rewards, 0.0)
        lengths += running & step.valid
        if step.costs is not None:
            costs += np.where(running & step.valid, step.costs, 0.0)
        if not (np.isfinite(scores.sum() + costs.sum()) and np.isfinite(step.observations.sum())):
            _refuse_non_finite(envs, t, scores, step.observations, costs)
        running &= ~(step.terminated | step.truncated)
        observations = step.observations
        if not running.any():
            break
    return scores.reshape(clients, copies), lengths.reshape(clients, copies), costs.reshape(clients, copies)


def _refuse_non_finite(
    envs: ClientEnvs, t: int, scores: np.ndarray, observations: np.ndarray, costs: np.ndarray
) -> None:
    """ValueError for the first copy whose score [L], cost [L] or observation [L, D] is not finite, if there is one."""
    for copy, client in enumerate(envs.names):
        seen = (("reward", scores[copy]), ("cost", costs[copy]), ("observation", observations[copy]))
        for what, value in seen:
            if not np.isfinite(value).all():
                problem = f"at step {t} of an evaluation episode, the {what} is not finite"
                raise ValueError(
                    f"client {client}: {problem}; mend the environment, or put a wrapper around it that does"
                )
