"""Collecting experience for K stacked clients: the loop over environment steps, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.policy.distributions import Distribution
from grpo_fed.rl.normalise import ObservationNormaliser, RewardNormaliser
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.tasks.envs import ClientEnvs, check_finite, non_finite_error
from grpo_fed.tasks.envs.action_log import ActionLog
from grpo_fed.tasks.envs.base import EnvStep

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
class Truncation:
    """A truncation."""

    client: int
    t: int
    copy: int
    observation: np.ndarray
    """[D] float32: what it was cut at, as the policy sees it."""


@dataclass(frozen=True)
class Trajectories:
    """What was lived through, before the critic has seen it."""

    observations: np.ndarray
    """[K, T, N, D] float32: as the policy saw them."""
    actions: np.ndarray
    """[K, T, N, A] float32."""
    rewards: np.ndarray
    """[K, T, N] float32: normalised if the scenario says so."""
    terminated: np.ndarray
    """[K, T, N] bool."""
    truncated: np.ndarray
    """[K, T, N] bool."""
    valid: np.ndarray
    """[K, T, N] bool."""
    last: np.ndarray
    """[K, N, D] float32: what the policy would act on next; with whole episodes what it began with."""
    cuts: list[Truncation]
    """Where episodes were truncated."""
    episodes: list[list[Episode]]
    """For each client, those that finished."""

    @property
    def steps(self) -> np.ndarray:
        """[K]: steps that are learned from."""
        return np.asarray(self.valid.sum((1, 2)))


class Actor:
    """The policy as a rollout uses it: numpy in, numpy out, on the parameters' own memory where that is possible."""

    def __init__(self, policy: StackedPolicy, parameters: Tensor) -> None:
        self.policy = policy
        if parameters.device.type == "cpu":
            self.act = policy.numpy_actor(policy.layout.views(parameters.numpy()))
        else:
            self.act = self._on_device
            self.views, self.device = policy.layout.views(parameters), parameters.device

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """[K, N, D] -> distribution parameters [K, N, M]."""
        return self.act(observations)

    def _on_device(self, observations: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            said = self.policy.act(self.views, torch.from_numpy(observations).to(self.device))
        array: np.ndarray = said.cpu().numpy()
        return array


@dataclass
class Collector:
    """Lanes of K clients with what must be remembered between two collections."""

    envs: ClientEnvs
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
    """[L]: raw rewards of the episodes under way."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[L]: their steps."""
    streams: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """[L]: names of the lanes' streams of episodes."""
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[L]: which episode of its stream a lane is in."""
    action_log: ActionLog = field(default_factory=lambda: ActionLog(0, 0))
    """What was done in the episodes under way, from which they can be taken up again."""

    @property
    def shape(self) -> tuple[int, int]:
        """K, N."""
        return len(self.names), self.envs.size // len(self.names)

    def begin(self, seeds: np.ndarray, learn: bool = True) -> np.ndarray:
        """Start every lane anew; `seeds` [L] uint64 name their streams of episodes. First raw observations, [L, D]."""
        raw = self.envs.reset(seeds)
        self.observations = self._seen(raw, learn)
        self.scores, self.lengths = np.zeros(self.envs.size), np.zeros(self.envs.size, np.int64)
        self.streams, self.numbers = seeds, np.zeros(self.envs.size, np.int64)
        self.action_log = ActionLog(self.envs.size, self.distribution.action_size)
        return raw

    def collect_steps(self, actor: Actor, horizon: int, numbers: np.ndarray) -> Trajectories:
        """`horizon` steps of every lane, the `numbers`-th [K] of each client; episodes go on from call to call."""
        assert self.observations is not None, "begin() comes first"
        observations, lanes, distribution = self.observations, self.envs, self.distribution
        noise = self._noise(self._generators(numbers), horizon)
        memory = _Memory.empty(horizon, lanes.size, lanes.observation_size, distribution.action_size)
        for t in range(horizon):
            actions = distribution.sample(actor(observations), noise[t]).reshape(lanes.size, -1)
            step = lanes.step(actions)
            memory.write(t, observations, actions, step)
            if self.reward_normaliser is not None:
                memory.learned[t] = self._normalised(step)
            observations = self._seen(step.observations, learn=True)
        self.observations = observations
        self.numbers += (memory.terminated | memory.truncated).sum(0)
        self.action_log.add(memory.actions, memory.terminated | memory.truncated)
        return self._finish(memory, horizon)

    def collect_episodes(
        self, actor: Actor, limits: np.ndarray, numbers: np.ndarray, seeds: np.ndarray, active: np.ndarray
    ) -> Trajectories:
        """One episode in every lane of the active [K] clients; those that are over sleep until the last one is.

        `limits` [K] are the steps that an episode of each client may have.

        Observations and rewards are normalised by what came before these episodes; afterwards they count too.
        """
        lanes, distribution = self.envs, self.distribution
        raw = self.begin(seeds, learn=False)
        generators = self._generators(numbers)
        limit = int(limits[active].max())
        memory = _Memory.empty(limit, lanes.size, lanes.observation_size, distribution.action_size)
        awake, steps, every_raw, noise = active.repeat(self.shape[1]), 0, [], np.zeros(0)
        while awake.any() and steps < limit:
            if steps % NOISE_BLOCK == 0:
                noise = self._noise(generators, NOISE_BLOCK)
            observations = self._seen(raw, learn=False)
            actions = distribution.sample(actor(observations), noise[steps % NOISE_BLOCK]).reshape(lanes.size, -1)
            step = lanes.step(actions, restart=False)
            memory.write(steps, observations, actions, replace(step, valid=step.valid & awake))
            every_raw.append(raw)
            raw, awake, steps = step.observations, awake & ~(step.terminated | step.truncated), steps + 1
        self._refuse_endless(awake | (memory.valid[:steps].sum(0) > limits.repeat(self.shape[1])), limits)
        if self.reward_normaliser is not None:
            lived = (_by_client(array[:steps], *self.shape) for array in (memory.rewards, memory.valid))
            memory.learned[:steps] = self.reward_normaliser.whole_episodes(*lived).swapaxes(0, 1).reshape(steps, -1)
        done = self._finish(memory, steps)
        self.observations = None  # nothing goes on from here
        if self.observation_normaliser is not None:
            seen = _by_client(np.stack(every_raw), *self.shape)
            for client, valid in enumerate(done.valid):
                self.observation_normaliser.update_one(client, seen[client][valid])
        return done

    def _refuse_endless(self, lanes: np.ndarray, limits: np.ndarray) -> None:
        """ValueError for the first of these lanes [L] bool, if there is one: its episode outlived its limit."""
        if lanes.any():
            client = int(lanes.argmax()) // self.shape[1]
            raise ValueError(
                f"client {self.names[client]}: an episode goes on after {limits[client]} steps, where its task says"
                " that it is cut; set rollout.episode_limit, or mend what hides the end (a wrapper?)"
            )

    def _generators(self, numbers: np.ndarray) -> list[np.random.Generator]:
        return [generator(seed, Purpose.ACTIONS, int(number)) for seed, number in zip(self.seeds, numbers, strict=True)]

    def _noise(self, generators: Sequence[np.random.Generator], steps: int) -> np.ndarray:
        """[T, K, N, noise]: each client's from its own stream."""
        copies = self.shape[1]
        return np.stack([self.distribution.draw_noise(rng, (steps, copies)) for rng in generators], 1)

    def _seen(self, raw: np.ndarray, learn: bool) -> np.ndarray:
        """Raw observations [L, D] as the policy sees them, [K, N, D]."""
        observations = raw.reshape(*self.shape, -1)
        if self.observation_normaliser is None:
            return observations
        if learn:
            self.observation_normaliser.update(observations)
        return self.observation_normaliser.apply(observations)

    def _normalised(self, step: EnvStep) -> np.ndarray:
        """Rewards [L] as they are learned from."""
        assert self.reward_normaliser is not None
        ends = step.terminated | step.truncated
        rewards, ends, valid = (part.reshape(self.shape) for part in (step.rewards, ends, step.valid))
        return self.reward_normaliser(rewards, ends, valid).reshape(-1)

    def state(self, client: int) -> dict[str, np.ndarray]:
        """What one client must remember to go on where it stands; empty before its first step."""
        if self.observations is None:
            return {}
        copies = self.shape[1]
        mine = slice(client * copies, (client + 1) * copies)
        actions = self.action_log.actions(mine)
        return {
            "observations": self.observations[client],
            "scores": self.scores[mine],
            "lengths": self.lengths[mine],
            "streams": self.streams[mine],
            "numbers": self.numbers[mine],
            "actions": np.concatenate(actions),
            "made": np.array([len(each) for each in actions]),
        }

    def load(self, states: Sequence[Mapping[str, np.ndarray]], first: np.ndarray) -> None:
        """Go on where `state` of every client was; who has not stepped yet begins as `first` [L] names its streams."""
        if not any(states):
            self.observations = None
            return
        given = [
            state or self._unstepped(seeds) for state, seeds in zip(states, first.reshape(self.shape), strict=True)
        ]

        def joint(name: str) -> np.ndarray:
            return np.concatenate([state[name] for state in given])

        self.streams, self.numbers = joint("streams"), joint("numbers")
        actions = np.split(joint("actions"), np.cumsum(joint("made"))[:-1])
        self.action_log = ActionLog.of(actions)
        raw = self.envs.resume(self.streams, self.numbers, actions)
        begun = {client: raw.reshape(*self.shape, -1)[client] for client, state in enumerate(states) if not state}
        if self.observation_normaliser is not None:
            for client, seen in begun.items():
                self.observation_normaliser.update_one(client, seen)
        if self.envs.reproducible:
            self.observations = np.stack([state["observations"] for state in given])
            for client, seen in begun.items():
                for copy, one in enumerate(seen):
                    self.observations[client, copy] = self._seen_one(client, one)
            self.scores, self.lengths = joint("scores"), joint("lengths")
        else:
            self.observations = self._seen(raw, learn=False)
            self.scores, self.lengths = np.zeros(self.envs.size), np.zeros(self.envs.size, np.int64)

    def _unstepped(self, streams: np.ndarray) -> dict[str, np.ndarray]:
        """`state` of a client at the very beginning, but for its observations."""
        copies, action = self.shape[1], self.distribution.action_size
        return {
            "observations": np.zeros((copies, self.envs.observation_size), np.float32),
            "scores": np.zeros(copies),
            "lengths": np.zeros(copies, np.int64),
            "streams": streams,
            "numbers": np.zeros(copies, np.int64),
            "actions": np.zeros((0, action), np.float32),
            "made": np.zeros(copies, np.int64),
        }

    def _finish(self, memory: _Memory, steps: int) -> Trajectories:
        """What was written, client by client, with the episodes that ended and the truncations among them."""
        assert self.observations is not None
        episodes, cuts = self._finished_episodes(memory, steps)
        rewards = memory.rewards if self.reward_normaliser is None else memory.learned
        done = Trajectories(
            observations=_by_client(memory.observations[:steps], *self.shape),
            actions=_by_client(memory.actions[:steps], *self.shape),
            rewards=_by_client(rewards[:steps].astype(np.float32), *self.shape),
            terminated=_by_client(memory.terminated[:steps], *self.shape),
            truncated=_by_client(memory.truncated[:steps], *self.shape),
            valid=_by_client(memory.valid[:steps], *self.shape),
            last=self.observations,
            cuts=cuts,
            episodes=episodes,
        )
        self._refuse_non_finite(done)
        return done

    def _refuse_non_finite(self, done: Trajectories) -> None:
        """ValueError for a NaN or infinity in anything that the policy or its critic looks at, or a reward."""
        check_finite(done.observations, done.rewards, self.names)
        check_finite(done.last[:, None], done.rewards[:, :0], self.names, first=done.rewards.shape[1])
        for cut in done.cuts:
            bad = np.flatnonzero(~np.isfinite(cut.observation))
            if bad.size:
                which = f"entry {bad[0]} of the observation that the episode was cut at"
                raise non_finite_error(self.names[cut.client], cut.copy, cut.t, which, cut.observation[bad[0]])

    def _finished_episodes(self, memory: _Memory, steps: int) -> tuple[list[list[Episode]], list[Truncation]]:
        """Episodes of each client that ended, and where they were truncated; sums of those under way go on."""
        copies = self.shape[1]
        valid = memory.valid[:steps]
        scores = self.scores + np.cumsum(np.where(valid, memory.rewards[:steps], 0.0), 0)
        lengths = self.lengths + np.cumsum(valid, 0)
        episodes: list[list[Episode]] = [[] for _ in self.names]
        cuts: list[Truncation] = []
        before: dict[int, tuple[float, int]] = {}
        for t, lane in np.argwhere((memory.terminated[:steps] | memory.truncated[:steps]) & valid).tolist():
            client, copy = divmod(lane, copies)
            score, length = before.get(lane, (0.0, 0))
            before[lane] = float(scores[t, lane]), int(lengths[t, lane])
            ended = bool(memory.terminated[t, lane])
            episodes[client].append(Episode(before[lane][0] - score, before[lane][1] - length, ended))
            if not ended:
                cuts.append(Truncation(client, t, copy, self._seen_one(client, memory.finals[t][lane])))
        self.scores, self.lengths = scores[-1], lengths[-1]
        for lane, (score, length) in before.items():
            self.scores[lane] -= score
            self.lengths[lane] -= length
        return episodes, cuts

    def _seen_one(self, client: int, observation: np.ndarray) -> np.ndarray:
        """One raw observation [D] of a client as its policy sees it now."""
        if self.observation_normaliser is None:
            return observation
        return self.observation_normaliser.apply_one(client, observation)


def _by_client(array: np.ndarray, clients: int, copies: int) -> np.ndarray:
    """[T, L, ...] -> [K, T, N, ...]."""
    return np.ascontiguousarray(array.reshape(len(array), clients, copies, *array.shape[2:]).swapaxes(0, 1))


@dataclass(frozen=True)
class _Memory:
    """Arrays of one collection while it is written, [T, L, ...]."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    """Raw."""
    learned: np.ndarray
    """Normalised, where there is a normaliser."""
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    finals: list[np.ndarray]
    """[L, D] each: what every step led to."""

    @classmethod
    def empty(cls, steps: int, lanes: int, observation: int, action: int) -> _Memory:
        shape = (steps, lanes)
        return cls(
            observations=np.empty((*shape, observation), np.float32),
            actions=np.empty((*shape, action), np.float32),
            rewards=np.empty(shape),
            learned=np.empty(shape, np.float32),
            terminated=np.empty(shape, bool),
            truncated=np.empty(shape, bool),
            valid=np.empty(shape, bool),
            finals=[],
        )

    def write(self, t: int, observations: np.ndarray, actions: np.ndarray, step: EnvStep) -> None:
        self.observations[t] = observations.reshape(actions.shape[0], -1)
        self.actions[t] = actions
        self.rewards[t] = step.rewards
        self.terminated[t] = step.terminated
        self.truncated[t] = step.truncated
        self.valid[t] = step.valid
        self.finals.append(step.final_observations)
