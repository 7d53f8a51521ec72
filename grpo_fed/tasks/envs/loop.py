"""Lanes over single gymnasium environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import numpy as np

from grpo_fed.tasks.envs.base import (
    ClientEnvs,
    EnvStep,
    StepLimits,
    episode_seed,
    episode_step_limit,
    pad_actions,
    reset_info_values,
)
from grpo_fed.tasks.envs.cache import EnvCache
from grpo_fed.tasks.envs.conversion import ActionConverter, flattener
from grpo_fed.tasks.gym import is_wrapped, make_env
from grpo_fed.tasks.task import Env, Task, TaskError


@final
class LoopEnvs(ClientEnvs):
    """A plain loop over environments, with no more in it than there must be."""

    reproducible = True

    def __init__(
        self, tasks: Sequence[Task], copies: int, squash: bool, episode_limit: int, shed: EnvCache | None = None
    ) -> None:
        """Tasks with actions of one shape and type. Environments come from the shed, if there is one, and go there."""
        self.tasks = [task for task in tasks for _ in range(copies)]
        self.names = tuple(task.client for task in self.tasks)
        self.observation_size = tasks[0].observation_size
        self._copies = copies
        self._actions = ActionConverter(self.tasks, squash)
        self._shed = shed
        make = partial(make_env, lean=True) if shed is None else shed.take
        self._envs = [make(task) for task in self.tasks]
        functions = [_flat(task, env) for task, env in zip(self.tasks, self._envs, strict=True)]
        self._resets = [reset for reset, _ in functions]
        self._steps = [step for _, step in functions]
        # where something is wrapped around an environment, a step in here need not be one out there, and its own limit
        # is kept inside
        limits = [episode_limit if is_wrapped(task) else episode_step_limit(task, episode_limit) for task in self.tasks]
        self._deadlines = StepLimits(limits)
        self._infos: list[dict[str, Any]] = [{} for _ in self.tasks]
        self._streams: list[int] = []
        self._episodes: list[int] = []
        self._awake: list[tuple[int, Callable[[Any], Any]]] = []
        self._asleep: dict[int, np.ndarray] = {}

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        assert seeds.shape == (self.size,), "a seed for each lane"
        self._streams = seeds.tolist()
        self._episodes = [0] * self.size
        self._awake, self._asleep = list(enumerate(self._steps)), {}
        observations = np.empty((self.size, self.observation_size), np.float32)
        for lane in range(self.size):
            self._begin(lane, observations)
        return observations

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        self._streams, self._episodes = seeds.tolist(), episodes.tolist()
        self._awake, self._asleep = list(enumerate(self._steps)), {}
        observations = np.empty((self.size, self.observation_size), np.float32)
        for lane in range(self.size):
            self._begin(lane, observations)
        made = np.array([len(each) for each in actions])
        for t, every in enumerate(pad_actions(actions, ends_together=False)):
            taken = self._taken(every)
            for lane in np.flatnonzero(made > t).tolist():
                try:
                    observations[lane] = self._steps[lane](taken[lane])[0]
                except Exception as error:
                    raise self._failed(lane, "step", error) from error
        self._deadlines.start(slice(None), made)
        return observations

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        assert self._streams, "reset() comes first"
        size, width = self.size, self.observation_size
        observations = np.empty((size, width), np.float32)
        rewards = np.zeros(size)
        terminated, truncated = np.zeros(size, bool), np.zeros(size, bool)
        done: list[int] = []
        taken = self._taken(actions)
        lane, reward = 0, 0.0
        try:
            for lane, act in self._awake:
                seen, reward, ended, cut, _ = act(taken[lane])
                if len(seen) != width:
                    raise ValueError(_misshaped(seen, width))
                observations[lane] = seen
                rewards[lane] = reward
                if ended or cut:
                    terminated[lane], truncated[lane] = ended, cut
                    done.append(lane)
        except Exception as error:
            raise self._failed(lane, "step", error, reward) from error
        valid = np.ones(size, bool)
        for lane, last in self._asleep.items():
            observations[lane], valid[lane] = last, False
        for lane in self._deadlines.tick():
            truncated[lane] = True
            if not (terminated[lane] or lane in done):
                done.append(lane)
        final = observations
        if done:
            final = observations.copy()
            self._go_on(done, observations, restart)
        return EnvStep(observations, final, rewards, terminated, truncated, valid)

    def _taken(self, actions: np.ndarray) -> list[Any]:
        """Each environment's own action; a choice as Python's int, which a space takes for its own in half the time."""
        converted = self._actions(actions)
        return converted.tolist() if converted.ndim == 1 and converted.dtype.kind in "iu" else list(converted)

    def _go_on(self, done: list[int], observations: np.ndarray, restart: bool) -> None:
        """Begin the next episodes of lanes that are done, or let them sleep."""
        if restart:
            for lane in done:
                self._begin(lane, observations)
            return
        self._asleep.update((lane, observations[lane].copy()) for lane in done)
        self._awake = [(lane, step) for lane, step in self._awake if lane not in self._asleep]
        self._deadlines.stop(done)

    def _begin(self, lane: int, observations: np.ndarray) -> None:
        """Begin a lane's next episode, and write down what it sees first."""
        seed = episode_seed(self._streams[lane], self._episodes[lane])
        self._episodes[lane] += 1
        try:
            seen, self._infos[lane] = self._resets[lane](seed=seed)
            if len(seen) != self.observation_size:
                raise ValueError(_misshaped(seen, self.observation_size))
            observations[lane] = seen
        except Exception as error:
            raise self._failed(lane, "reset", error) from error
        self._deadlines.start(lane)

    def _failed(self, lane: int, where: str, error: Exception, reward: Any = 0.0) -> TaskError:
        task = self.tasks[lane]
        text = f"{type(error).__name__}: {error}"
        if np.ndim(reward):
            text = f"its reward has shape {np.shape(reward)}; it must be a number"
        return TaskError(task.client, task.env, f"{where} of lane {lane % self._copies} failed: {text}")

    def reset_infos(self, key: str) -> np.ndarray:
        return reset_info_values(key, self._infos, self.names)

    def close(self) -> None:
        for task, env in zip(self.tasks, self._envs, strict=True):
            if self._shed is None:
                env.close()
            else:
                self._shed.give(task, env)


def _flat(task: Task, env: Env) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """An environment's reset and step, with flat observations."""
    flat = flattener(task.observation_space)
    if flat is None:
        return env.reset, env.step

    def reset(seed: int) -> tuple[Any, ...]:
        seen, *rest = env.reset(seed=seed)
        return flat(seen), *rest

    def step(action: Any) -> tuple[Any, ...]:
        seen, *rest = env.step(action)
        return flat(seen), *rest

    return reset, step


def _misshaped(seen: Any, width: int) -> str:
    return f"an observation has shape {np.shape(seen)}; its space says ({width},)"
