"""VectorEnvs and AutoresetEnvs: step gymnasium's vector environments.

`VectorEnvs` is for vector environments that are told which copies to reset, and with which seeds; `AutoresetEnvs` for
those that reset a copy by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, final

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from grpo_fed.tasks.envs.base import (
    ClientEnvs,
    EnvStep,
    Level,
    StepLimits,
    episode_seed,
    episode_step_limit,
    missing_cost_error,
    pad_actions,
    reset_info_values,
    take_seeds,
    without_seed,
)
from grpo_fed.tasks.envs.conversion import batch_flattener, flattener, make_batch_converter
from grpo_fed.tasks.families import FamilyVectorEnv
from grpo_fed.tasks.gym_task import GymTask, VectorEnv
from grpo_fed.tasks.task import TaskError


@final
class VectorEnvs(ClientEnvs):
    """Steps a vector environment with autoreset DISABLED, whose reset takes a mask and seeds."""

    reproducible = True

    def __init__(
        self,
        env: VectorEnv,
        tasks: Sequence[GymTask],
        squash: bool,
        episode_limit: int,
        cost_key: str | None = None,
    ) -> None:
        """env: has the same number of copies for each task, those of a task next to each other."""
        self.cost_key = cost_key
        num_envs = env.num_envs // len(tasks)
        self.tasks = [task for task in tasks for _ in range(num_envs)]
        self.names = tuple(task.client for task in self.tasks)
        self.observation_size, self.observation_dtype = tasks[0].observation_size, tasks[0].observation_dtype
        self._env = _FlatVectorEnv(env, self.tasks, make_batch_converter(self.tasks, squash))
        self._env_sleeps = isinstance(env.unwrapped, FamilyVectorEnv)
        """Whether the environment itself lets a copy sleep whose episode ended, and need not be kept from failing."""
        self._limits = StepLimits([episode_step_limit(task, episode_limit) for task in self.tasks])
        self._streams: list[int] = []
        self._episodes = [0] * self.size
        self._asleep = np.zeros(self.size, bool)
        self._any_asleep = False
        self._last = np.zeros((self.size, self.observation_size), self.observation_dtype)
        self._coming_levels: dict[int, Level] = {}
        """Levels that copies get when they begin their next episodes."""
        self._seeds: dict[int, int] = {}
        """The seed of the episodes of copies whose levels have one."""

    def set_levels(self, levels: Mapping[int, Level]) -> None:
        assert self._env_sleeps or not levels, "of all vector environments, families alone have levels"
        self._coming_levels |= levels

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        assert seeds.shape == (self.size,), "a seed for each env copy"
        self._streams = seeds.tolist()
        self._episodes = [0] * self.size
        self._asleep[:] = self._any_asleep = False
        return self._begin(np.ones(self.size, bool))

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        """Continue episodes as `ClientEnvs.resume` says; the actions of all copies end in the same step.

        A copy with fewer actions than others is stepped through episodes that do not count until its own begins.
        """
        self._streams, self._episodes = seeds.tolist(), episodes.tolist()
        self._asleep[:] = self._any_asleep = False
        steps_done = np.array([len(taken) for taken in actions])
        padded = pad_actions(actions, ends_together=True)
        observations = self._env.reset([0] * self.size)
        for remaining in range(len(padded), -1, -1):
            if (begins := steps_done == remaining).any():
                observations = self._begin(begins)
            if remaining:
                observations, _, *ended, _ = self._env.step(padded[len(padded) - remaining])
                self._limits.tick()
                if (waiting := (ended[0] | ended[1]) & (steps_done < remaining)).any():
                    self._env.reset([0 if waits else None for waits in waiting.tolist()], waiting)
        return observations

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        assert self._streams, "reset() comes first"
        final, rewards, terminated, truncated, infos = self._env.step(actions)
        if due := self._limits.tick():
            truncated[due] = True
        valid = ~self._asleep
        costs = None if self.cost_key is None else self._env.step_costs(infos, self.cost_key, valid)
        if self._any_asleep:
            self._reset_sleeping(terminated | truncated)
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
                self._put_to_sleep(done, final)
        return EnvStep(observations, final, rewards, terminated, truncated, valid, costs)

    def reset_infos(self, key: str) -> np.ndarray:
        return reset_info_values(key, self._env.infos, self.names)

    def close(self) -> None:
        self._env.env.close()

    def _begin(self, mask: np.ndarray) -> np.ndarray:
        """Begin the next episode of the copies in `mask`, [L] bool; observations [L, D] of all copies."""
        copies = np.flatnonzero(mask).tolist()
        seeds: list[int | None] = [None] * self.size
        if began := {copy: self._coming_levels.pop(copy) for copy in copies if copy in self._coming_levels}:
            self._seeds |= take_seeds(began)
            self._env.set_parameters({copy: without_seed(level) for copy, level in began.items()})
        for copy in copies:
            seed = self._seeds.get(copy)
            seeds[copy] = episode_seed(self._streams[copy], self._episodes[copy]) if seed is None else seed
            self._episodes[copy] += 1
        self._limits.start(mask)
        return self._env.reset(seeds, None if len(copies) == self.size else mask)

    def _put_to_sleep(self, mask: np.ndarray, final: np.ndarray) -> None:
        self._asleep |= mask
        self._any_asleep = True
        self._last[mask] = final[mask]
        self._limits.stop(mask)
        self._reset_sleeping(mask)

    def _reset_sleeping(self, done: np.ndarray) -> None:
        """Begin episodes that do not count in sleeping copies, where the environment may not be stepped once done."""
        mask = done & self._asleep
        if not self._env_sleeps and mask.any():
            infos = self._env.infos.copy()
            self._env.reset([0 if resets else None for resets in mask.tolist()], mask)
            self._env.infos = infos


@final
class AutoresetEnvs(ClientEnvs):
    """Steps a vector environment that resets a copy by itself, in the step after an episode's last one or in the same.

    Only `reset` can give it seeds: one for each copy if it is gymnasium's own, one for all copies if it is not.
    """

    reproducible = False

    def __init__(self, env: VectorEnv, task: GymTask, squash: bool, cost_key: str | None = None) -> None:
        """env: truncates the episodes itself. task: that of all copies."""
        self.cost_key = cost_key
        self.names = (task.client,) * env.num_envs
        self.observation_size, self.observation_dtype = task.observation_size, task.observation_dtype
        self._env = _FlatVectorEnv(env, [task] * env.num_envs, make_batch_converter(task, squash))
        self._resets_in_same_step = env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        self._takes_many_seeds = isinstance(env.unwrapped, SyncVectorEnv | AsyncVectorEnv)
        self._resetting = np.zeros(self.size, bool)
        self._asleep = np.zeros(self.size, bool)
        self._last = np.zeros((self.size, self.observation_size), self.observation_dtype)

    def set_levels(self, levels: Mapping[int, Level]) -> None:
        assert not levels, "an environment that resets itself has no levels"

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        assert seeds.shape == (self.size,), "a seed for each env copy"
        self._resetting[:] = self._asleep[:] = False
        streams = seeds.tolist()
        if self._takes_many_seeds:
            return self._env.reset([episode_seed(stream, 0) for stream in streams])
        return self._env.reset(reduce(lambda seed, stream: episode_seed(stream, seed), streams, 0))

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        streams = [
            episode_seed(stream, episode) for stream, episode in zip(seeds.tolist(), episodes.tolist(), strict=True)
        ]
        return self.reset(np.array(streams, np.uint64))

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        observations, rewards, terminated, truncated, infos = self._env.step(actions)
        done = terminated | truncated
        final = observations
        if self._resets_in_same_step:
            valid = ~self._asleep
            if done.any():
                final = self._env.final_observations(observations, infos, done)
            began = done & restart
        else:
            valid = ~(self._asleep | self._resetting)
            began, self._resetting = self._resetting, done
        costs = None if self.cost_key is None else self._env.step_costs(infos, self.cost_key, valid)
        self._env.remember(infos, began & ~self._asleep)
        rewards[~valid] = 0.0
        terminated &= valid
        truncated &= valid
        if self._asleep.any():
            observations, final = observations.copy(), final.copy()
            observations[self._asleep] = final[self._asleep] = self._last[self._asleep]
        if not restart:
            self._put_to_sleep(terminated | truncated, observations, final)
        return EnvStep(observations, final, rewards, terminated, truncated, valid, costs)

    def reset_infos(self, key: str) -> np.ndarray:
        return reset_info_values(key, self._env.infos, self.names)

    def close(self) -> None:
        self._env.env.close()

    def _put_to_sleep(self, mask: np.ndarray, observations: np.ndarray, final: np.ndarray) -> None:
        self._asleep |= mask
        self._last[mask] = observations[mask] = final[mask]


@final
class _FlatVectorEnv:
    """A vector environment with flat observations, which names the client in errors and remembers infos of resets."""

    def __init__(self, env: VectorEnv, tasks: Sequence[GymTask], convert: Callable[[np.ndarray], Any]) -> None:
        self.env = env
        self.tasks = tasks
        self.convert = convert
        self.flatten = batch_flattener(env.single_observation_space, env.observation_space)
        self.flatten_one = flattener(env.single_observation_space)
        self.infos: list[dict[str, Any]] = [{} for _ in tasks]
        """[L]: the info of each copy's latest reset."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
        """Step all copies; observations [L, D], rewards, terminated and truncated [L], which are new, and infos."""
        try:
            seen, rewards, terminated, truncated, infos = self.env.step(self.convert(actions))
            shape = (len(self.tasks),)
            flags = np.array(terminated, bool).reshape(shape), np.array(truncated, bool).reshape(shape)
            return self.flatten(seen), np.array(rewards, np.float64).reshape(shape), *flags, infos
        except Exception as error:
            raise self._failure("step", error) from error

    def reset(self, seed: int | Sequence[int | None], mask: np.ndarray | None = None) -> np.ndarray:
        """Reset the copies in `mask` [L] bool, or all of them; observations [L, D] of all copies."""
        options = None if mask is None else {"reset_mask": mask.copy()}
        try:
            seen, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # many: as SyncVectorEnv
            flat = self.flatten(seen)
        except Exception as error:
            cure = "" if isinstance(seed, int) else "it must take a list of seeds, and options['reset_mask']"
            raise self._failure("reset", error, cure) from error
        self.remember(infos, np.ones(len(self.tasks), bool) if mask is None else mask)
        return flat

    def set_parameters(self, levels: Mapping[int, Level]) -> None:
        """Give env copies of a family other parameters; they are reset before they are stepped again."""
        assert isinstance(self.env.unwrapped, FamilyVectorEnv)
        try:
            self.env.unwrapped.set_parameters(levels)
        except ValueError as error:
            raise self._failure("reset", error) from error

    def final_observations(self, observations: np.ndarray, infos: Mapping[str, Any], done: np.ndarray) -> np.ndarray:
        """Return the observations with the last ones of the episodes that ended and were reset within the step."""
        final = observations.copy()
        try:
            for copy in np.flatnonzero(done):
                last = infos["final_obs"][copy]
                final[copy] = last if self.flatten_one is None else self.flatten_one(last)
        except Exception as error:
            text = "with AutoresetMode.SAME_STEP, infos['final_obs'] must hold the last observations"
            raise self._failure("step", error, text) from error
        return final

    def step_costs(self, infos: Mapping[str, Any], key: str, valid: np.ndarray) -> np.ndarray:
        """Read the costs [L] of a step from its infos; 0 for copies whose step is not valid [L] bool."""
        costs, known = np.zeros(len(self.tasks)), np.zeros(len(self.tasks), bool)
        for part in (infos, infos.get("final_info", {})):  # the latter of episodes that were reset within the step
            if key in part:
                mask = part.get(f"_{key}", np.ones(len(self.tasks), bool))
                costs[mask], known = np.asarray(part[key], np.float64)[mask], known | mask
        if not known[valid].all():
            others = (name for name in infos if not name.startswith("_") and name != key)
            raise self._failure("step", missing_cost_error(key, others))
        costs[~valid] = 0.0
        return costs

    def remember(self, infos: Mapping[str, Any], mask: np.ndarray) -> None:
        """Store the infos of the resets of some copies, which gymnasium gives for all copies together."""
        if not infos and not any(self.infos):
            return
        for copy in np.flatnonzero(mask).tolist():
            self.infos[copy] = {
                key: values[copy]
                for key, values in infos.items()
                if isinstance(values, np.ndarray) and f"_{key}" in infos and infos[f"_{key}"][copy]
            }

    def _failure(self, call: str, error: Exception, cure: str = "") -> TaskError:
        """Return the error that says which clients' environment failed, in which call, why, and what to do."""
        first, *others = dict.fromkeys(task.client for task in self.tasks)
        clients = f"{first} and {len(others)} stepped with it" if others else first
        text = f"{call} failed: {type(error).__name__}: {error}"
        return TaskError(clients, self.tasks[0].env, f"{text}; {cure}" if cure else text)
