"""Lanes over gymnasium vector environments: one whose copies start when they are told to, or one that resets itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, final

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from grpo_fed.tasks.envs.base import (
    ClientEnvs,
    EnvStep,
    StepLimits,
    episode_seed,
    episode_step_limit,
    pad_actions,
    reset_info_values,
)
from grpo_fed.tasks.envs.conversion import ActionConverter, batch_flattener, flattener
from grpo_fed.tasks.families import FamilyVectorEnv
from grpo_fed.tasks.task import Task, TaskError, Vector


@final
class VectorEnvs(ClientEnvs):
    """Lanes of a vector environment with autoreset DISABLED, which takes a mask and seeds when it is reset."""

    reproducible = True

    def __init__(self, env: Vector, tasks: Sequence[Task], squash: bool, episode_limit: int) -> None:
        """`env` has the same number of copies for each task, a task's own next to each other."""
        copies = env.num_envs // len(tasks)
        self.tasks = [task for task in tasks for _ in range(copies)]
        self.names = tuple(task.client for task in self.tasks)
        self.observation_size = tasks[0].observation_size
        self._vector = _Vector(env, self.tasks, ActionConverter(self.tasks, squash))
        self._sleeps_by_itself = isinstance(env.unwrapped, FamilyVectorEnv)
        self._deadlines = StepLimits([episode_step_limit(task, episode_limit) for task in self.tasks])
        self._streams: list[int] = []
        self._episodes = [0] * self.size
        self._asleep = np.zeros(self.size, bool)
        self._anyone_asleep = False
        self._last = np.zeros((self.size, self.observation_size), np.float32)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        assert seeds.shape == (self.size,), "a seed for each lane"
        self._streams = seeds.tolist()
        self._episodes = [0] * self.size
        self._asleep[:] = self._anyone_asleep = False
        return self._begin(np.ones(self.size, bool))

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        """Episodes end together: a lane whose own is short waits in one that does not count."""
        self._streams, self._episodes = seeds.tolist(), episodes.tolist()
        self._asleep[:] = self._anyone_asleep = False
        made = np.array([len(each) for each in actions])
        every = pad_actions(actions, ends_together=True)
        observations = self._vector.reset([0] * self.size)
        for left in range(len(every), -1, -1):
            if (begins := made == left).any():
                observations = self._begin(begins)
            if left:
                observations, _, *ended, _ = self._vector.step(every[len(every) - left])
                self._deadlines.tick()
                if (waiting := (ended[0] | ended[1]) & (made < left)).any():
                    self._vector.reset([0 if lane else None for lane in waiting.tolist()], waiting)
        return observations

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        assert self._streams, "reset() comes first"
        final, rewards, terminated, truncated, _ = self._vector.step(actions)
        if due := self._deadlines.tick():
            truncated[due] = True
        valid = ~self._asleep
        if self._anyone_asleep:
            self._go_on_unseen(terminated | truncated)
            final[self._asleep] = self._last[self._asleep]
            rewards[self._asleep] = 0.0
            terminated &= valid
            truncated &= valid
        done = terminated | truncated
        observations = final
        if np.count_nonzero(done):
            observations = final.copy()
            if restart:
                observations[done] = self._begin(done)[done]
            else:
                self._sleep(done, final)
        return EnvStep(observations, final, rewards, terminated, truncated, valid)

    def _begin(self, lanes: np.ndarray) -> np.ndarray:
        """Begin the next episode of some lanes, [L] bool; observations of all."""
        numbers = np.flatnonzero(lanes).tolist()
        seeds: list[int | None] = [None] * self.size
        for lane in numbers:
            seeds[lane] = episode_seed(self._streams[lane], self._episodes[lane])
            self._episodes[lane] += 1
        self._deadlines.start(lanes)
        return self._vector.reset(seeds, None if len(numbers) == self.size else lanes)

    def _sleep(self, lanes: np.ndarray, final: np.ndarray) -> None:
        self._asleep |= lanes
        self._anyone_asleep = True
        self._last[lanes] = final[lanes]
        self._deadlines.stop(lanes)
        self._go_on_unseen(lanes)

    def _go_on_unseen(self, done: np.ndarray) -> None:
        """What must not be stepped once it is done begins another episode, which does not count."""
        lanes = done & self._asleep
        if not self._sleeps_by_itself and lanes.any():
            infos = self._vector.infos.copy()
            self._vector.reset([0 if lane else None for lane in lanes.tolist()], lanes)
            self._vector.infos = infos

    def reset_infos(self, key: str) -> np.ndarray:
        return reset_info_values(key, self._vector.infos, self.names)

    def close(self) -> None:
        self._vector.env.close()


@final
class AutoresetEnvs(ClientEnvs):
    """Lanes of a vector environment that resets a copy by itself, in the step after the last one or in the same.

    Only `reset` can give it seeds: one for each lane if it is gymnasium's own, one for all if it is not.
    """

    reproducible = False

    def __init__(self, env: Vector, task: Task, squash: bool) -> None:
        """All copies are of one task, and `env` cuts their episodes."""
        self.names = (task.client,) * env.num_envs
        self.observation_size = task.observation_size
        self._vector = _Vector(env, [task] * env.num_envs, ActionConverter(task, squash))
        self._same_step = env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        self._takes_many_seeds = isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self._resetting = np.zeros(self.size, bool)
        self._asleep = np.zeros(self.size, bool)
        self._last = np.zeros((self.size, self.observation_size), np.float32)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        assert seeds.shape == (self.size,), "a seed for each lane"
        self._resetting[:] = self._asleep[:] = False
        streams = seeds.tolist()
        if self._takes_many_seeds:
            return self._vector.reset([episode_seed(stream, 0) for stream in streams])
        return self._vector.reset(reduce(lambda seed, stream: episode_seed(stream, seed), streams, 0))

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        names = [
            episode_seed(stream, episode) for stream, episode in zip(seeds.tolist(), episodes.tolist(), strict=True)
        ]
        return self.reset(np.array(names, np.uint64))

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        observations, rewards, terminated, truncated, infos = self._vector.step(actions)
        done = terminated | truncated
        final = observations
        if self._same_step:
            valid = ~self._asleep
            if done.any():
                final = self._vector.final(observations, infos, done)
            began = done & restart
        else:
            valid = ~(self._asleep | self._resetting)
            began, self._resetting = self._resetting, done
        self._vector.remember(infos, began & ~self._asleep)
        rewards[~valid] = 0.0
        terminated &= valid
        truncated &= valid
        if self._asleep.any():
            observations, final = observations.copy(), final.copy()
            observations[self._asleep] = final[self._asleep] = self._last[self._asleep]
        if not restart:
            self._sleep(terminated | truncated, observations, final)
        return EnvStep(observations, final, rewards, terminated, truncated, valid)

    def _sleep(self, lanes: np.ndarray, observations: np.ndarray, final: np.ndarray) -> None:
        self._asleep |= lanes
        self._last[lanes] = observations[lanes] = final[lanes]

    def reset_infos(self, key: str) -> np.ndarray:
        return reset_info_values(key, self._vector.infos, self.names)

    def close(self) -> None:
        self._vector.env.close()


@final
class _Vector:
    """A vector environment with flat observations, errors that name a client, and a memory of its resets' infos."""

    def __init__(self, env: Vector, tasks: Sequence[Task], actions: ActionConverter) -> None:
        self.env = env
        self.tasks = tasks
        self.actions = actions
        self.flat = batch_flattener(env.single_observation_space, env.observation_space)
        self.flat_one = flattener(env.single_observation_space)
        self.infos: list[dict[str, Any]] = [{} for _ in tasks]
        """Of the latest resets."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
        """Everything but infos is new: it may be written into."""
        try:
            seen, rewards, terminated, truncated, infos = self.env.step(self.actions(actions))
            shape = (len(self.tasks),)
            flags = np.array(terminated, bool).reshape(shape), np.array(truncated, bool).reshape(shape)
            return self.flat(seen), np.array(rewards, np.float64).reshape(shape), *flags, infos
        except Exception as error:
            raise self._failed("step", error) from error

    def reset(self, seed: int | Sequence[int | None], lanes: np.ndarray | None = None) -> np.ndarray:
        """Observations [L, D] of all lanes, after a reset of those in `lanes` [L] bool, or of all."""
        options = None if lanes is None else {"reset_mask": lanes.copy()}
        try:
            seen, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # many: as SyncVectorEnv
            flat = self.flat(seen)
        except Exception as error:
            cure = "" if isinstance(seed, int) else "it must take a list of seeds, and options['reset_mask']"
            raise self._failed("reset", error, cure) from error
        self.remember(infos, np.ones(len(self.tasks), bool) if lanes is None else lanes)
        return flat

    def final(self, observations: np.ndarray, infos: Mapping[str, Any], done: np.ndarray) -> np.ndarray:
        """What the last step led to in lanes that have been reset within it."""
        final = observations.copy()
        try:
            for lane in np.flatnonzero(done):
                last = infos["final_obs"][lane]
                final[lane] = last if self.flat_one is None else self.flat_one(last)
        except Exception as error:
            text = "with AutoresetMode.SAME_STEP, infos['final_obs'] must hold the last observations"
            raise self._failed("step", error, text) from error
        return final

    def remember(self, infos: Mapping[str, Any], lanes: np.ndarray) -> None:
        """Keep what infos, as gymnasium batches them, say of the resets of some lanes."""
        if not infos and not any(self.infos):
            return
        for lane in np.flatnonzero(lanes).tolist():
            self.infos[lane] = {
                key: values[lane]
                for key, values in infos.items()
                if isinstance(values, np.ndarray) and f"_{key}" in infos and infos[f"_{key}"][lane]
            }

    def _failed(self, where: str, error: Exception, cure: str = "") -> TaskError:
        first, *others = dict.fromkeys(task.client for task in self.tasks)
        clients = f"{first} and {len(others)} stepped with it" if others else first
        text = f"{where} failed: {type(error).__name__}: {error}"
        return TaskError(clients, self.tasks[0].env, f"{text}; {cure}" if cure else text)
