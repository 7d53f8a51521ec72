"""Collecting experience for K stacked clients: the loop over environment steps, in numpy.

Each client has N copies of its environment; L = K * N copies are stepped together, those of one client next to each
other. T steps, D observation entries, A action entries, M distribution parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from math import nan
from typing import Any

import numpy as np

from grpo_fed.policy.distributions import Distribution
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.episode_sums import split_sums
from grpo_fed.rl.normalise import ObservationNormaliser, RewardNormaliser
from grpo_fed.rl.records import Episode
from grpo_fed.rl.recurrence import attach_first, attach_memory, with_memory
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.rl.trajectories import StepBuffer, Trajectories, Truncation, by_client
from grpo_fed.tasks.envs import ClientEnvs, check_finite, name_levels, non_finite_error
from grpo_fed.tasks.envs.action_log import ActionLog
from grpo_fed.tasks.envs.base import EnvStep

NOISE_BLOCK = 64
"""Steps of action noise that are drawn at once where the length of an episode is not known."""


@dataclass
class Collector:
    """Collects steps in the environments of K clients, and remembers the running episodes between two calls."""

    envs: ClientEnvs
    names: Sequence[str]
    """Names of the clients, for errors."""
    seeds: Sequence[int]
    """Names of the clients' random streams."""
    distribution: Distribution
    observation_normaliser: ObservationNormaliser | None
    reward_normaliser: RewardNormaliser | None
    memory_size: int = 0
    """H: numbers that the policies remember from step to step."""
    reward_scale: np.ndarray | None = None
    """[L]: what each copy's rewards are multiplied by, to be learned from; None for 1."""
    reward_clip: float | None = None
    """The largest absolute value of a scaled reward; None for no limit."""
    observations: np.ndarray | None = None
    """[K, N, D]: the observations to act on next, as the policy sees them, with its memory if it has one; None before
    the first step."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[L]: sum of the raw rewards of each running episode."""
    costs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[L]: sum of its costs, where costs are read."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[L]: number of its steps."""
    streams: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """[L]: names of the copies' streams of episodes."""
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[L]: number of the running episode in its stream."""
    action_log: ActionLog = field(default_factory=lambda: ActionLog(0, 0))
    """Actions of the running episodes, from which these can be replayed."""
    levels: dict[int, np.ndarray] = field(default_factory=dict)
    """[N, Q] by client: the levels of the running episodes, of a client whose task has levels."""
    levels_before: dict[int, np.ndarray] = field(default_factory=dict)
    """[N, Q] by client: the levels of the episodes that ran when the last steps were collected first."""
    coming_levels: dict[int, np.ndarray] = field(default_factory=dict)
    """[N, Q] by client: the levels of the episodes that its copies begin from now on."""
    level_names: dict[int, Sequence[str]] = field(default_factory=dict)
    """[Q] by client: what a level has values for."""

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of clients and of copies of each, (K, N)."""
        return len(self.names), self.envs.size // len(self.names)

    def set_levels(self, client: int, names: Sequence[str], levels: np.ndarray) -> None:
        """Set the levels of the episodes that a client's copies begin from now on, [N, Q]. names: [Q]."""
        self.coming_levels[client], self.level_names[client] = levels, names
        self.envs.set_levels(name_levels(names, levels, client * self.shape[1]))

    def begin(self, seeds: np.ndarray, learn: bool = True) -> np.ndarray:
        """Start a new episode in every copy; gives the first raw observations, [L, D].

        seeds: [L] uint64, names of the copies' streams of episodes.
        learn: whether the normaliser takes the observations into account.
        """
        raw = self.envs.reset(seeds)
        self.levels = {client: levels.copy() for client, levels in self.coming_levels.items()}
        self.observations = attach_first(self._normalise_observations(raw, learn), self.memory_size)
        self._begin_sums()
        self.streams, self.numbers = seeds, np.zeros(self.envs.size, np.int64)
        self.action_log = ActionLog(self.envs.size, self.distribution.action_size)
        return raw

    def collect_steps(self, actor: Actor, horizon: int, numbers: np.ndarray) -> Trajectories:
        """Collect `horizon` steps of every copy; episodes go on from call to call.

        numbers: [K], name the random streams of the clients' actions.
        """
        assert self.observations is not None, "begin() comes first"
        observations, envs, distribution = self.observations, self.envs, self.distribution
        noise = self._noise(self._generators(numbers), horizon)
        self.levels_before = {client: levels.copy() for client, levels in self.levels.items()}
        buffer = self._buffer(horizon)
        for t in range(horizon):
            actions = distribution.sample(actor(observations), noise[t]).reshape(envs.size, -1)
            step = envs.step(actions)
            buffer.write(t, observations, actions, step, actor.memory)
            if self.reward_normaliser is not None:
                buffer.normalised[t] = self._normalise_rewards(step)
            observations = self._normalise_observations(step.observations, learn=True)
            if self.memory_size:
                begins = (step.terminated | step.truncated | ~step.valid).reshape(self.shape)
                observations = attach_memory(observations, actor.memory, begins)
        self.observations = observations
        self.numbers += (buffer.terminated | buffer.truncated).sum(0)
        self.action_log.add(buffer.actions, buffer.terminated | buffer.truncated)
        return self._finish(buffer, horizon)

    def collect_episodes(
        self, actor: Actor, limits: np.ndarray, numbers: np.ndarray, seeds: np.ndarray, active: np.ndarray
    ) -> Trajectories:
        """Collect one episode in every copy of the active clients; copies wait for the longest episode.

        Observations and rewards are normalised by what came before these episodes; afterwards they count too.

        limits: [K], the most steps that an episode of each client may have.
        numbers: [K], name the random streams of the clients' actions.
        seeds: [L] uint64, names of the copies' streams of episodes.
        active: [K] bool.
        """
        envs, distribution = self.envs, self.distribution
        raw = self.begin(seeds, learn=False)
        generators = self._generators(numbers)
        limit = int(limits[active].max())
        buffer = self._buffer(limit)
        running, steps, every_raw, noise = active.repeat(self.shape[1]), 0, [], np.zeros(0)
        while running.any() and steps < limit:
            if steps % NOISE_BLOCK == 0:
                noise = self._noise(generators, NOISE_BLOCK)
            observations = with_memory(self._normalise_observations(raw, learn=False), actor, begins=steps == 0)
            actions = distribution.sample(actor(observations), noise[steps % NOISE_BLOCK]).reshape(envs.size, -1)
            step = envs.step(actions, restart=False)
            buffer.write(steps, observations, actions, replace(step, valid=step.valid & running), actor.memory)
            every_raw.append(raw)
            raw, running, steps = step.observations, running & ~(step.terminated | step.truncated), steps + 1
        self._refuse_endless(running | (buffer.valid[:steps].sum(0) > limits.repeat(self.shape[1])), limits)
        if self.reward_normaliser is not None:
            rewards, valid = (by_client(array[:steps], *self.shape) for array in (buffer.rewards, buffer.valid))
            normalised = self.reward_normaliser.whole_episodes(rewards, valid)
            buffer.normalised[:steps] = normalised.swapaxes(0, 1).reshape(steps, -1)
        trajectories = self._finish(buffer, steps)
        self.observations = None  # the next batch begins with new episodes
        if self.observation_normaliser is not None:
            for client, seen in enumerate(by_client(np.stack(every_raw), *self.shape)):
                self.observation_normaliser.update_one(client, seen[trajectories.valid[client]])
        return trajectories

    def _begin_sums(self) -> None:
        """Begin the sums of new episodes in every copy."""
        self.scores, self.costs = np.zeros(self.envs.size), np.zeros(self.envs.size)
        self.lengths = np.zeros(self.envs.size, np.int64)

    @property
    def observation_dtype(self) -> np.dtype[Any]:
        """The type of what the policy sees."""
        return np.dtype(np.float32) if self.observation_normaliser is not None else self.envs.observation_dtype

    @property
    def _input_size(self) -> int:
        """Entries of what the policy sees."""
        return self.envs.observation_size + (self.memory_size + 1 if self.memory_size else 0)

    def _buffer(self, steps: int) -> StepBuffer:
        such = np.zeros((self.envs.size, self._input_size), self.observation_dtype)
        return StepBuffer.empty(steps, such, self.distribution.action_size, self.envs.cost_key is not None)

    def _refuse_endless(self, endless: np.ndarray, limits: np.ndarray) -> None:
        """ValueError for the first copy, if any, whose episode went on after its limit [K]; endless: [L] bool."""
        if endless.any():
            client = int(endless.argmax()) // self.shape[1]
            raise ValueError(
                f"client {self.names[client]}: an episode goes on after {limits[client]} steps, where its task says"
                " that it is truncated; set rollout.episode_limit, or mend what hides the end (a wrapper?)"
            )

    def _generators(self, numbers: np.ndarray) -> list[np.random.Generator]:
        return [generator(seed, Purpose.ACTIONS, int(number)) for seed, number in zip(self.seeds, numbers, strict=True)]

    def _noise(self, generators: Sequence[np.random.Generator], steps: int) -> np.ndarray:
        """Noise for the actions of T steps, [T, K, N, noise], from each client's own stream."""
        copies = self.shape[1]
        return np.stack([self.distribution.draw_noise(rng, (steps, copies)) for rng in generators], 1)

    def _normalise_observations(self, raw: np.ndarray, learn: bool) -> np.ndarray:
        """Raw observations [L, D] as the policy sees them, [K, N, D]; learn: whether the normaliser counts them."""
        observations = raw.reshape(*self.shape, -1)
        if self.observation_normaliser is None:
            return observations
        if learn:
            self.observation_normaliser.update(observations)
        return self.observation_normaliser.apply(observations)

    def _normalise_rewards(self, step: EnvStep) -> np.ndarray:
        """A step's rewards [L], normalised."""
        assert self.reward_normaliser is not None
        ends = step.terminated | step.truncated
        rewards, ends, valid = (part.reshape(self.shape) for part in (step.rewards, ends, step.valid))
        return self.reward_normaliser(rewards, ends, valid).reshape(-1)

    def state(self, client: int) -> dict[str, np.ndarray]:
        """All that one client's environments need to go on; empty before the first step."""
        if self.observations is None:
            return {}
        copies = self.shape[1]
        own = slice(client * copies, (client + 1) * copies)
        actions = self.action_log.actions(own)
        return {
            "observations": self.observations[client],
            "scores": self.scores[own],
            "lengths": self.lengths[own],
            **({} if self.envs.cost_key is None else {"costs": self.costs[own]}),
            "streams": self.streams[own],
            "numbers": self.numbers[own],
            "actions": np.concatenate(actions),
            "made": np.array([len(each) for each in actions]),
            **({"levels": self.levels[client]} if client in self.levels else {}),
        }

    def load(self, states: Sequence[Mapping[str, np.ndarray]], first: np.ndarray) -> None:
        """Go on from one `state` for each client.

        first: [L] uint64, names of the streams of episodes that clients begin their tasks with. A client that has not
            stepped yet begins them. So does one whose state has other streams, since its task has changed: its running
            episodes are cut.
        """
        streams_by_client = first.reshape(self.shape)
        states = [
            self._without_cut_episodes(client, state, streams_by_client[client]) for client, state in enumerate(states)
        ]
        if not any(states):
            self.observations = None
            return
        complete = [
            state or self._first_state(streams) for state, streams in zip(states, streams_by_client, strict=True)
        ]

        def joint(name: str) -> np.ndarray:
            return np.concatenate([state[name] for state in complete])

        self._resume_levels(states)
        self.streams, self.numbers = joint("streams"), joint("numbers")
        actions = np.split(joint("actions"), np.cumsum(joint("made"))[:-1])
        self.action_log = ActionLog.of(actions)
        raw = self.envs.resume(self.streams, self.numbers, actions)
        first_raw = {client: raw.reshape(*self.shape, -1)[client] for client, state in enumerate(states) if not state}
        if self.observation_normaliser is not None:
            for client, observations in first_raw.items():
                self.observation_normaliser.update_one(client, observations)
        if self.envs.reproducible:
            self.observations = np.stack([state["observations"] for state in complete])
            for client, observations in first_raw.items():
                for copy, observation in enumerate(observations):
                    seen = self._normalise_one(client, observation)
                    self.observations[client, copy] = attach_first(seen, self.memory_size)
            self.scores, self.lengths = joint("scores"), joint("lengths")
            # a run that goes on with a limit on costs has not read what its running episodes have cost so far
            copies = np.zeros(self.shape[1])
            self.costs = np.concatenate([state.get("costs", copies) for state in complete])
        else:
            self.observations = attach_first(self._normalise_observations(raw, learn=False), self.memory_size)
            self._begin_sums()

    def _resume_levels(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Set the levels of the episodes that are continued, by client; others begin with those that come."""
        for client, names in self.level_names.items():
            if "levels" in states[client]:
                self.set_levels(client, names, states[client]["levels"])
        self.levels = {client: levels.copy() for client, levels in self.coming_levels.items()}

    def _without_cut_episodes(
        self, client: int, state: Mapping[str, np.ndarray], streams: np.ndarray
    ) -> Mapping[str, np.ndarray]:
        """A client's state; that of before its first step if its episodes are of other streams than these [N]."""
        if not state or np.array_equal(state["streams"], streams):
            return state
        if self.reward_normaliser is not None:
            self.reward_normaliser.returns[client] = 0.0
        return {}

    def _first_state(self, streams: np.ndarray) -> dict[str, np.ndarray]:
        """The `state` of a client before its first step, with 0 for its observations."""
        copies, action = self.shape[1], self.distribution.action_size
        return {
            "observations": np.zeros((copies, self._input_size), self.observation_dtype),
            "scores": np.zeros(copies),
            "lengths": np.zeros(copies, np.int64),
            "streams": streams,
            "numbers": np.zeros(copies, np.int64),
            "actions": np.zeros((0, action), np.float32),
            "made": np.zeros(copies, np.int64),
        }

    def _finish(self, buffer: StepBuffer, steps: int) -> Trajectories:
        """The collected steps by client, with the episodes that finished and the truncations among them."""
        assert self.observations is not None
        episodes, cuts = self._finished_episodes(buffer, steps)
        rewards = self._scaled(buffer.rewards) if self.reward_normaliser is None else buffer.normalised
        trajectories = Trajectories(
            observations=by_client(buffer.observations[:steps], *self.shape),
            actions=by_client(buffer.actions[:steps], *self.shape),
            rewards=by_client(rewards[:steps].astype(np.float32), *self.shape),
            terminated=by_client(buffer.terminated[:steps], *self.shape),
            truncated=by_client(buffer.truncated[:steps], *self.shape),
            valid=by_client(buffer.valid[:steps], *self.shape),
            last=self.observations,
            cuts=cuts,
            episodes=episodes,
            costs=None if buffer.costs is None else by_client(buffer.costs[:steps].astype(np.float32), *self.shape),
        )
        self._refuse_non_finite(trajectories)
        return trajectories

    def _scaled(self, rewards: np.ndarray) -> np.ndarray:
        """Raw rewards [T, L] as they are learned from, without a running normaliser."""
        scaled = rewards if self.reward_scale is None else rewards * self.reward_scale
        return scaled if self.reward_clip is None else np.clip(scaled, -self.reward_clip, self.reward_clip)

    def _refuse_non_finite(self, trajectories: Trajectories) -> None:
        """ValueError for a NaN or infinity in a reward, or in an observation that policy or critic are applied to."""
        rewards = trajectories.rewards
        check_finite(trajectories.observations, rewards, self.names)
        if trajectories.costs is not None:
            check_finite(trajectories.observations[:, :0], trajectories.costs, self.names, reward="cost")
        check_finite(trajectories.last[:, None], rewards[:, :0], self.names, first=rewards.shape[1])
        for cut in trajectories.cuts:
            bad = np.flatnonzero(~np.isfinite(cut.observation))
            if bad.size:
                which = f"entry {bad[0]} of the observation that the episode was truncated at"
                raise non_finite_error(self.names[cut.client], cut.copy, cut.t, which, cut.observation[bad[0]])

    def _finished_episodes(self, buffer: StepBuffer, steps: int) -> tuple[list[list[Episode]], list[Truncation]]:
        """The episodes of each client that finished, and where they were truncated; sets the sums of running ones.

        An episode's score is the copy's running sum of rewards at its end, less what the sum was at the end of the
        episode before.
        """
        copies = self.shape[1]
        valid = buffer.valid[:steps]
        scores = self.scores + np.cumsum(np.where(valid, buffer.rewards[:steps], 0.0), 0)
        lengths = self.lengths + np.cumsum(valid, 0)
        t, rows = np.nonzero((buffer.terminated[:steps] | buffer.truncated[:steps]) & valid)
        score, self.scores = split_sums(scores, t, rows)
        length, self.lengths = split_sums(lengths, t, rows)
        clients, terminated = rows // copies, buffer.terminated[t, rows]
        sums = [score, length, terminated]
        if buffer.costs is not None:
            costs = self.costs + np.cumsum(np.where(valid, buffer.costs[:steps], 0.0), 0)
            cost, self.costs = split_sums(costs, t, rows)
            sums.append(cost)
        order = np.argsort(clients, kind="stable")  # client by client, in order of time
        levels = self._levels_of(rows[order].tolist()) if self.levels else repeat(())
        columns = [part[order].tolist() for part in sums]
        finished = map(Episode, *columns, *([] if buffer.costs is not None else [repeat(nan)]), levels)
        counts = np.bincount(clients, minlength=len(self.names)).tolist()
        cuts = [
            Truncation(row // copies, step, row % copies, self._final_input(buffer, step, row))
            for step, row in zip(t[~terminated].tolist(), rows[~terminated].tolist(), strict=True)
        ]
        return [list(islice(finished, count)) for count in counts], cuts

    def _final_input(self, buffer: StepBuffer, step: int, row: int) -> np.ndarray:
        """What a copy's policy sees after a step that ended an episode, with what it remembers of it."""
        client, copy = divmod(row, self.shape[1])
        seen = self._normalise_one(client, buffer.finals[step][row])
        if not self.memory_size:
            return seen
        return attach_memory(seen, buffer.memories[step][client, copy], np.zeros((), bool))

    def _levels_of(self, rows: Sequence[int]) -> list[tuple[float, ...]]:
        """The levels [E] of episodes that ended in these copies [E], in order of time; a copy's next one has begun."""
        copies, levels = self.shape[1], list[tuple[float, ...]]()
        for row in rows:
            client, copy = divmod(row, copies)
            if client not in self.levels:
                levels.append(())
                continue
            levels.append(tuple(self.levels[client][copy].tolist()))
            self.levels[client][copy] = self.coming_levels[client][copy]
        return levels

    def _normalise_one(self, client: int, observation: np.ndarray) -> np.ndarray:
        """One raw observation [D] of a client as its policy sees it."""
        if self.observation_normaliser is None:
            return observation
        return self.observation_normaliser.apply_one(client, observation)
