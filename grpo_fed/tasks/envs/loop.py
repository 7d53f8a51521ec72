"""LoopEnvs: steps single gymnasium environments one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from grpo_fed.tasks.action_spaces import rows_of
from grpo_fed.tasks.envs.base import (
    ClientEnvs,
    EnvStep,
    Level,
    StepLimits,
    episode_seed,
    episode_step_limit,
    pad_actions,
    read_cost,
    reset_info_values,
    take_seeds,
    without_seed,
)
from grpo_fed.tasks.envs.cache import EnvCache
from grpo_fed.tasks.envs.conversion import flattener, make_action_converter
from grpo_fed.tasks.gym import is_wrapped, make_env
from grpo_fed.tasks.gym_task import Env, GymTask
from grpo_fed.tasks.task import TaskError


@final
class LoopEnvs(ClientEnvs):
    """Steps environments in a plain loop that does as little as possible for each."""

    reproducible = True

    def __init__(
        self,
        tasks: Sequence[GymTask],
        num_envs: int,
        squash: bool,
        episode_limit: int,
        cache: EnvCache | None = None,
        cost_key: str | None = None,
    ) -> None:
        """tasks: their actions have one shape and type. cache: takes the place of making and closing environments."""
        self.cost_key = cost_key
        self.tasks = [task for task in tasks for _ in range(num_envs)]
        self.names = tuple(task.client for task in self.tasks)
        self.observation_size, self.observation_dtype = tasks[0].observation_size, tasks[0].observation_dtype
        self._num_envs = num_envs
        self._convert = make_action_converter(self.tasks, squash)
        self._cache = cache
        self._envs = [self._make(task) for task in self.tasks]
        functions = [_flat_functions(task, env) for task, env in zip(self.tasks, self._envs, strict=True)]
        self._resets = [reset for reset, _ in functions]
        self._steps = [step for _, step in functions]
        # a step of a wrapper may be several steps of the environment inside, so the task's own limit, which counts
        # those, is left to gymnasium's wrapper there
        limits = [episode_limit if is_wrapped(task) else episode_step_limit(task, episode_limit) for task in self.tasks]
        self._limits = StepLimits(limits)
        self._coming_levels: dict[int, Level] = {}
        """Levels that copies get when they begin their next episodes, in environments that are made for them."""
        self._seeds: dict[int, int] = {}
        """The seed of the episodes of copies whose levels have one."""
        self._infos: list[dict[str, Any]] = [{} for _ in self.tasks]
        self._streams: list[int] = []
        self._episodes: list[int] = []
        self._awake: list[tuple[int, Callable[[Any], Any]]] = []
        self._asleep: dict[int, np.ndarray] = {}

    def set_levels(self, levels: Mapping[int, Level]) -> None:
        self._coming_levels |= levels

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        assert seeds.shape == (self.size,), "a seed for each env copy"
        self._streams = seeds.tolist()
        self._episodes = [0] * self.size
        return self._begin_all()

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        self._streams, self._episodes = seeds.tolist(), episodes.tolist()
        observations = self._begin_all()
        steps_done = np.array([len(taken) for taken in actions])
        for t, row in enumerate(pad_actions(actions, ends_together=False)):
            converted = self._env_actions(row)
            for copy in np.flatnonzero(steps_done > t).tolist():
                try:
                    observations[copy] = self._steps[copy](converted[copy])[0]
                except Exception as error:
                    raise self._failure(copy, "step", error) from error
        self._limits.start(slice(None), steps_done)
        return observations

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        assert self._streams, "reset() comes first"
        size, width = self.size, self.observation_size
        observations = np.empty((size, width), self.observation_dtype)
        rewards, costs = np.zeros(size), None if self.cost_key is None else np.zeros(size)
        terminated, truncated = np.zeros(size, bool), np.zeros(size, bool)
        done: list[int] = []
        converted = self._env_actions(actions)
        copy, reward = 0, 0.0
        try:
            for copy, step in self._awake:
                seen, reward, ended, cut, info = step(converted[copy])
                if len(seen) != width:
                    raise ValueError(_explain_shape(seen, width))
                observations[copy] = seen
                rewards[copy] = reward
                if costs is not None and self.cost_key is not None:
                    costs[copy] = read_cost(info, self.cost_key)
                if ended or cut:
                    terminated[copy], truncated[copy] = ended, cut
                    done.append(copy)
        except Exception as error:
            raise self._failure(copy, "step", error, reward) from error
        valid = np.ones(size, bool)
        for copy, last in self._asleep.items():
            observations[copy], valid[copy] = last, False
        for copy in self._limits.tick():
            truncated[copy] = True
            if not (terminated[copy] or copy in done):
                done.append(copy)
        final = observations
        if done:
            final = observations.copy()
            self._begin_or_sleep(done, observations, restart)
        return EnvStep(observations, final, rewards, terminated, truncated, valid, costs)

    def reset_infos(self, key: str) -> np.ndarray:
        return reset_info_values(key, self._infos, self.names)

    def close(self) -> None:
        for task, env in zip(self.tasks, self._envs, strict=True):
            if self._cache is None or task.curriculum is not None:
                env.close()
            else:
                self._cache.put(task, env)

    def _make(self, task: GymTask) -> Env:
        """Make an environment, or take one from the cache; those of other levels are never in it."""
        if self._cache is None or task.curriculum is not None:
            return make_env(task, lean=True)
        return self._cache.take(task)

    def _env_actions(self, actions: np.ndarray) -> list[Any]:
        """Convert actions [L, A] into one for each environment.

        A choice becomes Python's int: a Discrete space checks whether it holds one in half the time of numpy's.
        """
        converted = self._convert(actions)
        return converted if isinstance(converted, list) else rows_of(converted)

    def _begin_all(self) -> np.ndarray:
        """Wake all copies and begin their next episodes; first observations [L, D]."""
        observations = np.empty((self.size, self.observation_size), self.observation_dtype)
        for copy in range(self.size):
            self._begin(copy, observations)
        self._awake, self._asleep = list(enumerate(self._steps)), {}
        return observations

    def _begin_or_sleep(self, done: list[int], observations: np.ndarray, restart: bool) -> None:
        """Begin the next episodes of copies whose episodes ended, or let them sleep."""
        if restart:
            has_levels = bool(self._coming_levels)
            for copy in done:
                self._begin(copy, observations)
            if has_levels:
                self._awake = [(copy, self._steps[copy]) for copy, _ in self._awake]
            return
        self._asleep.update((copy, observations[copy].copy()) for copy in done)
        self._awake = [(copy, step) for copy, step in self._awake if copy not in self._asleep]
        self._limits.stop(done)

    def _begin(self, copy: int, observations: np.ndarray) -> None:
        """Begin a copy's next episode, and write its first observation into `observations`."""
        if copy in self._coming_levels:
            self._change_level(copy, self._coming_levels.pop(copy))
        seed = self._seeds.get(copy)
        if seed is None:
            seed = episode_seed(self._streams[copy], self._episodes[copy])
        self._episodes[copy] += 1
        try:
            seen, self._infos[copy] = self._resets[copy](seed=seed)
            if len(seen) != self.observation_size:
                raise ValueError(_explain_shape(seen, self.observation_size))
            observations[copy] = seen
        except Exception as error:
            raise self._failure(copy, "reset", error) from error
        self._limits.start(copy)

    def _change_level(self, copy: int, level: Level) -> None:
        """Put an environment with other arguments in the place of a copy's, if the level has any."""
        self._seeds |= take_seeds({copy: level})
        arguments, task = without_seed(level), self.tasks[copy]
        if not arguments:
            return
        self._envs[copy].close()
        self._envs[copy] = make_env(replace(task, kwargs={**task.kwargs, **arguments}), lean=True)
        self._resets[copy], self._steps[copy] = _flat_functions(task, self._envs[copy])

    def _failure(self, copy: int, call: str, error: Exception, reward: Any = 0.0) -> TaskError:
        """Return the error that says which client's environment failed, in which call and why."""
        task = self.tasks[copy]
        text = f"{type(error).__name__}: {error}"
        if np.ndim(reward):
            text = f"its reward has shape {np.shape(reward)}; it must be a number"
        return TaskError(task.client, task.env, f"{call} of env copy {copy % self._num_envs} failed: {text}")


def _flat_functions(task: GymTask, env: Env) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Return an environment's reset and step, with flat observations."""
    flatten = flattener(task.observation_space)
    if flatten is None:
        return env.reset, env.step

    def reset(seed: int) -> tuple[Any, ...]:
        seen, *rest = env.reset(seed=seed)
        return flatten(seen), *rest

    def step(action: Any) -> tuple[Any, ...]:
        seen, *rest = env.step(action)
        return flatten(seen), *rest

    return reset, step


def _explain_shape(seen: Any, width: int) -> str:
    return f"an observation has shape {np.shape(seen)}; its space has ({width},)"
