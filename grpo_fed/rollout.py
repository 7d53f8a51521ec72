"""Collecting experience for K stacked clients, and completing it to a Batch with what the policy said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from grpo_fed.distributions import Distribution
from grpo_fed.lanes import Lanes, check_finite
from grpo_fed.normalise import ObservationNormaliser, RewardNormaliser
from grpo_fed.policy import Parameters, Policy
from grpo_fed.records import Batch, Output, Step
from grpo_fed.streams import Purpose, generator

NOISE_BLOCK = 64
"""Steps of action noise that are drawn at once where an episode's length is not known before."""


@dataclass(frozen=True)
class Episode:
    """A finished episode, in raw rewards."""

    score: float
    """Sum of its rewards."""
    length: int
    """Its steps."""
    terminated: bool
    """Ended by the task, not cut."""


@dataclass(frozen=True)
class Trajectories:
    """What was lived through, before the critic has seen it."""

    observations: np.ndarray
    """[K, T, N, D] float32: as the policy saw them."""
    actions: np.ndarray
    """[K, T, N, A] float32."""
    rewards: np.ndarray
    """[K, T, N] float32."""
    terminated: np.ndarray
    """[K, T, N] bool."""
    truncated: np.ndarray
    """[K, T, N] bool."""
    valid: np.ndarray
    """[K, T, N] bool."""
    last: np.ndarray
    """[K, N, D] float32: what the policy would act on next."""
    cut: list[tuple[int, int, int]]
    """Places (k, t, n) of truncations."""
    cut_observations: list[np.ndarray]
    """For each of them, the observation [D] it was cut at."""
    episodes: list[list[Episode]]
    """For each client, those that finished."""

    @property
    def steps(self) -> np.ndarray:
        """[K]: steps that count."""
        return np.asarray(self.valid.sum((1, 2)))


class Actor:
    """The policy as a rollout uses it: numpy in, numpy out, on the parameters' own memory where that is possible."""

    def __init__(self, policy: Policy, parameters: Tensor) -> None:
        self.policy = policy
        self.device = parameters.device
        self.views = policy.layout.views(parameters)
        self.arrays = policy.layout.views(parameters.numpy()) if self.device.type == "cpu" else None

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """[K, N, D] -> distribution parameters [K, N, M]."""
        if self.arrays is not None:
            return self.policy.act_numpy(self.arrays, observations)
        with torch.inference_mode():
            said = self.policy.act(self.views, torch.from_numpy(observations).to(self.device))
        array: np.ndarray = said.cpu().numpy()
        return array


@dataclass
class Collector:
    """Lanes of K clients with what must be remembered between two collections."""

    lanes: Lanes
    names: Sequence[str]
    """Of the clients, for errors."""
    seeds: Sequence[int]
    """Of the clients."""
    distribution: Distribution
    observation_normaliser: ObservationNormaliser | None
    reward_normaliser: RewardNormaliser | None
    observations: np.ndarray | None = None
    """[K, N, D]: what to act on next, as the policy sees it; None before the first step."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[L]: rewards of the episodes under way."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    """[L]: their steps."""

    @property
    def shape(self) -> tuple[int, int]:
        """K, N."""
        return len(self.names), self.lanes.size // len(self.names)

    def begin(self, seeds: np.ndarray, learn: bool = True) -> None:
        """Start every lane anew; `seeds` [L] uint64 name their streams of episodes."""
        clients, copies = self.shape
        first = self.lanes.reset(seeds).reshape(clients, copies, -1)
        self.observations = self._seen(first, learn)
        self.scores = np.zeros(self.lanes.size)
        self.lengths = np.zeros(self.lanes.size, int)

    def segments(self, actor: Actor, horizon: int, numbers: np.ndarray) -> Trajectories:
        """`horizon` steps of every lane, the `numbers`-th [K] of each client; episodes go on from call to call."""
        clients, copies = self.shape
        noise = self._noise(self._generators(numbers), horizon)
        memory = _Memory.empty(clients, horizon, copies, self.lanes.observation_size, self.distribution.action_size)
        assert self.observations is not None, "begin() comes first"
        for t in range(horizon):
            action = self.distribution.sample(actor(self.observations), noise[:, t])
            step = self.lanes.step(action.reshape(clients * copies, -1))
            memory.write(t, self.observations, action, step)
            self._count(t, step, memory)
            self.observations = self._seen(step.observations.reshape(clients, copies, -1), learn=True)
        return self._finish(memory, horizon)

    def whole_episodes(
        self, actor: Actor, limit: int, numbers: np.ndarray, seeds: np.ndarray, active: np.ndarray
    ) -> Trajectories:
        """One episode in every lane of the active [K] clients; those that are over sleep until the last one is."""
        clients, copies = self.shape
        self.begin(seeds, learn=False)
        assert self.observations is not None
        generators = self._generators(numbers)
        memory = _Memory.empty(clients, limit, copies, self.lanes.observation_size, self.distribution.action_size)
        awake, steps = active.repeat(copies), 0
        noise = np.zeros(0)
        while awake.any() and steps < limit:
            if steps % NOISE_BLOCK == 0:
                noise = self._noise(generators, NOISE_BLOCK)
            action = self.distribution.sample(actor(self.observations), noise[:, steps % NOISE_BLOCK])
            step = self.lanes.step(action.reshape(clients * copies, -1), restart=False)
            step = replace(step, valid=step.valid & awake)
            memory.write(steps, self.observations, action, step)
            self._count(steps, step, memory)
            awake &= ~(step.terminated | step.truncated)
            self.observations = self._seen(step.observations.reshape(clients, copies, -1), learn=False)
            steps += 1
        self._cut_short(memory, steps, awake)
        trajectories = self._finish(memory, steps)
        if self.observation_normaliser is not None:
            self._learn_scale(trajectories)
        return trajectories

    def _generators(self, numbers: np.ndarray) -> list[np.random.Generator]:
        return [generator(seed, Purpose.ACTIONS, int(number)) for seed, number in zip(self.seeds, numbers, strict=True)]

    def _noise(self, generators: Sequence[np.random.Generator], horizon: int) -> np.ndarray:
        """[K, T, N, noise]: each client's from its own stream."""
        copies = self.shape[1]
        return np.stack([self.distribution.draw_noise(rng, (horizon, copies)) for rng in generators])

    def _seen(self, observations: np.ndarray, learn: bool) -> np.ndarray:
        """Raw observations [K, N, D] as the policy sees them."""
        if self.observation_normaliser is None:
            return observations.copy()
        if learn:
            self.observation_normaliser.update(observations)
        return self.observation_normaliser.apply(observations)

    def _count(self, t: int, step: Step, memory: _Memory) -> None:
        """Scores of episodes, normalised rewards, and what truncated episodes ended on."""
        clients, copies = self.shape
        done = step.terminated | step.truncated
        if self.reward_normaliser is not None:
            rewards, ends, valid = (part.reshape(clients, copies) for part in (step.rewards, done, step.valid))
            memory.rewards[:, t] = self.reward_normaliser(rewards, ends, valid)
        self.scores += step.rewards
        self.lengths += step.valid
        if not done.any():
            return
        for lane in np.flatnonzero(done & step.valid):
            client, copy = divmod(int(lane), copies)
            ended = bool(step.terminated[lane])
            memory.episodes[client].append(Episode(float(self.scores[lane]), int(self.lengths[lane]), ended))
            self.scores[lane], self.lengths[lane] = 0.0, 0
            if not ended:
                memory.cut.append((client, t, copy))
                memory.cut_observations.append(self._seen_one(client, step.final_observations[lane]))

    def _seen_one(self, client: int, observation: np.ndarray) -> np.ndarray:
        """One raw observation [D] of a client as its policy sees it."""
        if self.observation_normaliser is None:
            return observation.astype(np.float32)
        return self.observation_normaliser.apply_one(client, observation)

    def _cut_short(self, memory: _Memory, steps: int, awake: np.ndarray) -> None:
        """Episodes that are longer than the limit count as truncated there."""
        copies = self.shape[1]
        assert self.observations is not None
        for lane in np.flatnonzero(awake):
            client, copy = divmod(int(lane), copies)
            memory.truncated[client, steps - 1, copy] = True
            memory.cut.append((client, steps - 1, copy))
            memory.cut_observations.append(self.observations[client, copy].copy())
            memory.episodes[client].append(Episode(float(self.scores[lane]), int(self.lengths[lane]), False))

    def _finish(self, memory: _Memory, steps: int) -> Trajectories:
        assert self.observations is not None
        done = memory.trajectories(steps, self.observations)
        check_finite(done.observations, done.rewards, self.names)
        return done

    def _learn_scale(self, done: Trajectories) -> None:
        """Whole episodes are normalised by what came before them; afterwards they count too."""
        assert self.observation_normaliser is not None
        raw = self.observation_normaliser.undo(done.observations)
        for client in range(self.shape[0]):
            self.observation_normaliser.update_one(client, raw[client][done.valid[client]])


@dataclass(frozen=True)
class _Memory:
    """Arrays of one collection while it is written, [K, T, N, ...]."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    cut: list[tuple[int, int, int]]
    cut_observations: list[np.ndarray]
    episodes: list[list[Episode]]

    @classmethod
    def empty(cls, clients: int, steps: int, copies: int, observation: int, action: int) -> _Memory:
        shape = (clients, steps, copies)
        return cls(
            np.empty((*shape, observation), np.float32),
            np.empty((*shape, action), np.float32),
            np.empty(shape, np.float32),
            np.empty(shape, bool),
            np.empty(shape, bool),
            np.empty(shape, bool),
            [],
            [],
            [[] for _ in range(clients)],
        )

    def write(self, t: int, observations: np.ndarray, actions: np.ndarray, step: Step) -> None:
        shape = observations.shape[:2]
        self.observations[:, t] = observations
        self.actions[:, t] = actions
        self.rewards[:, t] = step.rewards.reshape(shape)
        self.terminated[:, t] = step.terminated.reshape(shape)
        self.truncated[:, t] = step.truncated.reshape(shape)
        self.valid[:, t] = step.valid.reshape(shape)

    def trajectories(self, steps: int, last: np.ndarray) -> Trajectories:
        return Trajectories(
            self.observations[:, :steps],
            self.actions[:, :steps],
            self.rewards[:, :steps],
            self.terminated[:, :steps],
            self.truncated[:, :steps],
            self.valid[:, :steps],
            last,
            self.cut,
            self.cut_observations,
            self.episodes,
        )


def complete(policy: Policy, parameters: Parameters, done: Trajectories, rows: slice) -> Batch:
    """Some clients' trajectories with what the policy and its critic say of them, in one pass without autograd."""
    clients, steps, copies, size = done.observations[rows].shape
    device = next(iter(parameters.values())).device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[rows])).to(device)

    observations, actions = tensor(done.observations), tensor(done.actions)
    last = tensor(done.last)
    cut, cut_observations = _padded(done, range(*rows.indices(len(done.observations))), size)
    with torch.no_grad():
        seen = [observations.view(clients, steps * copies, size), last, cut_observations.to(device)]
        said = policy.forward(parameters, torch.cat(seen, 1))
        values, next_values = _values(said, done, rows, (clients, steps, copies), cut)
        distribution = said.distribution[:, : steps * copies].reshape(clients, steps, copies, -1)
        log_probs = policy.distribution.log_prob(distribution, actions)
    ends = done.terminated[rows] | done.truncated[rows]
    before = np.cumsum(ends, 1) - ends
    return Batch(
        observations=observations,
        actions=actions,
        log_probs=log_probs,
        distribution=distribution,
        values=values,
        next_values=next_values,
        rewards=tensor(done.rewards),
        ends=torch.from_numpy(ends).to(device),
        valid=tensor(done.valid),
        episodes=torch.from_numpy(np.where(done.valid[rows], before * copies + np.arange(copies), 0)).to(device),
    )


def _padded(done: Trajectories, rows: range, size: int) -> tuple[list[tuple[int, int, int, int]], Tensor]:
    """Observations that the clients' episodes were cut at, [K, X, D] with zeros behind; and (k, t, n, x) of each."""
    counts = [0] * len(rows)
    places = []
    for (client, t, copy), observation in zip(done.cut, done.cut_observations, strict=True):
        if client in rows:
            row = client - rows.start
            places.append(((row, t, copy, counts[row]), observation))
            counts[row] += 1
    padded = np.zeros((len(rows), max(counts), size), np.float32)
    for (row, _, _, x), observation in places:
        padded[row, x] = observation
    return [place for place, _ in places], torch.from_numpy(padded)


def _values(
    said: Output, done: Trajectories, rows: slice, shape: tuple[int, int, int], cut: list[tuple[int, int, int, int]]
) -> tuple[Tensor, Tensor]:
    """Values of the observations and of what came after, [K, T, N] each; the last and the cut ones stand behind."""
    clients, steps, copies = shape
    every = said.values[:, : (steps + 1) * copies].view(clients, steps + 1, copies)
    values, next_values = every[:, :-1], every[:, 1:].clone()
    if cut:
        k, t, n, x = torch.tensor(cut, device=values.device).T
        next_values[k, t, n] = said.values[:, (steps + 1) * copies :][k, x]
    terminated = torch.from_numpy(np.ascontiguousarray(done.terminated[rows])).to(values.device)
    return values, next_values.masked_fill_(terminated, 0.0)
