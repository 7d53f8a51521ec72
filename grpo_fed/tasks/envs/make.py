"""Choosing lanes for some tasks, and stepping unlike ones together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import fields, replace
from typing import TypeAlias, final

import numpy as np
from gymnasium.vector import AutoresetMode

from grpo_fed.rl.records import Step
from grpo_fed.tasks.envs.base import Lanes, limit_of
from grpo_fed.tasks.envs.cache import Shed
from grpo_fed.tasks.envs.loop import EnvLanes
from grpo_fed.tasks.envs.vector import SelfResettingLanes, VectorLanes
from grpo_fed.tasks.families import FAMILIES
from grpo_fed.tasks.families.environments import ENDLESS
from grpo_fed.tasks.resolve import Task, Vector, make_vector

FAMILY = "grpo_fed.tasks.families.environments:make_vector"
"""The vector entry point of every family of ours."""
Index: TypeAlias = slice | np.ndarray


def make_lanes(
    tasks: Sequence[Task], num_envs: int, squash: bool = False, episode_limit: int = 0, shed: Shed | None = None
) -> Lanes:
    """`num_envs` copies of each task; with `squash`, actions go through tanh onto their box.

    Episodes are truncated after `episode_limit` steps (0: only when the task itself says so). Closed, they leave what
    they can in the shed, and its owner closes it.
    """
    together: dict[Hashable, list[int]] = defaultdict(list)
    for client, task in enumerate(tasks):
        _check_alike(task, tasks[0])
        if squash:
            _check_bounded(task)
        together[_kind(task)].append(client)
    parts = []
    for clients in together.values():
        lanes = _part([tasks[client] for client in clients], num_envs, squash, episode_limit, shed)
        parts.append((lanes, _index(clients, num_envs)))
    return parts[0][0] if len(parts) == 1 else JointLanes(parts)


def _check_alike(task: Task, first: Task) -> None:
    if task.signature != first.signature:
        one, other = (f"{each.env} has (observations, actions) {each.signature}" for each in (first, task))
        raise ValueError(f"clients {first.client} and {task.client} cannot be stepped together: {one}, {other}")


def _check_bounded(task: Task) -> None:
    for entry, (low, high) in enumerate(zip(task.action.low, task.action.high, strict=True)):
        if not np.isfinite(high - low):
            raise ValueError(
                f"policy.squash = true: client {task.client}: entry {entry} of the actions of {task.env} goes from"
                f" {low} to {high}, which tanh cannot be stretched to; set policy.squash = false, or bound the actions"
                " with a wrapper"
            )


def _kind(task: Task) -> Hashable:
    """Tasks for which this is equal are stepped by the same Lanes."""
    spec = task.spec
    if spec.vector_entry_point == FAMILY and not task.wrapped:
        family = FAMILIES.get(str(spec.kwargs.get("family")))
        shapes = () if family is None else tuple(task.kwargs.get(field.name) for field in fields(family))  # type: ignore[arg-type]
        return "family", spec.id, shapes
    if spec.entry_point is None:
        return "vector", task.client
    return "single", task.action_space.shape, task.action_space.dtype


def _part(tasks: Sequence[Task], copies: int, squash: bool, episode_limit: int, shed: Shed | None) -> Lanes:
    """The lanes of tasks of one kind."""
    first, spec = tasks[0], tasks[0].spec
    if spec.vector_entry_point == FAMILY and not first.wrapped:
        return VectorLanes(_family(tasks, copies), tasks, squash, episode_limit)
    if spec.entry_point is not None:
        return EnvLanes(tasks, copies, squash, episode_limit, shed)
    env = make_vector(first, copies, limit_of(first, episode_limit))
    mode = env.metadata.get("autoreset_mode")
    if mode == AutoresetMode.DISABLED:
        return VectorLanes(env, tasks, squash, episode_limit)
    if mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        return SelfResettingLanes(env, first, squash)
    raise ValueError(
        f"client {first.client}: {first.env}: metadata['autoreset_mode'] of its vector environment is {mode!r}; it must"
        " be a gymnasium.vector.AutoresetMode"
    )


def _family(tasks: Sequence[Task], copies: int) -> Vector:
    """All copies of tasks of a family in one vector environment: every parameter as a list with one for each lane."""
    names = dict.fromkeys(name for task in tasks for name in task.kwargs)
    each = {name: [task.kwargs.get(name) for task in tasks for _ in range(copies)] for name in names}
    more = {"autoreset_mode": AutoresetMode.DISABLED, "max_episode_steps": ENDLESS}  # lanes count the steps
    return make_vector(replace(tasks[0], kwargs={**each, **more}), copies * len(tasks), None)


def _index(clients: Sequence[int], copies: int) -> Index:
    """Which lanes the copies of these clients are; a slice where one does."""
    if clients[-1] - clients[0] == len(clients) - 1:
        return slice(clients[0] * copies, (clients[-1] + 1) * copies)
    return (np.array(clients)[:, None] * copies + np.arange(copies)).ravel()


@final
class JointLanes(Lanes):
    """Lanes of several kinds, each of which is some of these."""

    def __init__(self, parts: Sequence[tuple[Lanes, Index]]) -> None:
        """Each part with the lanes that it is; together they are all."""
        self.parts = parts
        self.observation_size = parts[0][0].observation_size
        self.reproducible = all(lanes.reproducible for lanes, _ in parts)
        names = np.empty(sum(lanes.size for lanes, _ in parts), object)
        for lanes, index in parts:
            names[index] = lanes.names
        self.names = tuple(names)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        observations = np.empty((self.size, self.observation_size), np.float32)
        for lanes, index in self.parts:
            observations[index] = lanes.reset(seeds[index])
        return observations

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        observations = np.empty((self.size, self.observation_size), np.float32)
        every = np.arange(self.size)
        for lanes, index in self.parts:
            mine = [actions[lane] for lane in every[index].tolist()]
            observations[index] = lanes.resume(seeds[index], episodes[index], mine)
        return observations

    def step(self, actions: np.ndarray, restart: bool = True) -> Step:
        shape = (self.size, self.observation_size)
        joint = Step(
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(self.size),
            *(np.empty(self.size, bool) for _ in range(3)),
        )
        for lanes, index in self.parts:
            step = lanes.step(actions[index], restart)
            for name, values in vars(step).items():
                getattr(joint, name)[index] = values
        return joint

    def reset_infos(self, key: str) -> np.ndarray:
        found = [lanes.reset_infos(key) for lanes, _ in self.parts]
        joint = np.empty(self.size, np.result_type(*found))
        for (_, index), values in zip(self.parts, found, strict=True):
            joint[index] = values
        return joint

    def close(self) -> None:
        for lanes, _ in self.parts:
            lanes.close()
