"""Choosing lanes for some tasks, and stepping unlike ones together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import fields, replace

import numpy as np
from gymnasium.vector import AutoresetMode

from grpo_fed.tasks.envs.base import ClientEnvs, episode_step_limit
from grpo_fed.tasks.envs.cache import EnvCache
from grpo_fed.tasks.envs.loop import LoopEnvs
from grpo_fed.tasks.envs.mixed import MixedEnvs, join_indices
from grpo_fed.tasks.envs.vector import AutoresetEnvs, VectorEnvs
from grpo_fed.tasks.families import FAMILIES
from grpo_fed.tasks.families.environments import NO_STEP_LIMIT
from grpo_fed.tasks.gym import find_env_spec, is_wrapped, make_vector_env
from grpo_fed.tasks.task import Task, Vector

FAMILY = "grpo_fed.tasks.families.environments:make_family_vector_env"
"""The vector entry point of every family of ours."""


def make_client_envs(
    tasks: Sequence[Task], num_envs: int, squash: bool = False, episode_limit: int = 0, shed: EnvCache | None = None
) -> ClientEnvs:
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
        parts.append((lanes, join_indices(clients, num_envs)))
    return parts[0][0] if len(parts) == 1 else MixedEnvs(parts)


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
    spec = find_env_spec(task)
    if spec.vector_entry_point == FAMILY and not is_wrapped(task):
        family = FAMILIES.get(str(spec.kwargs.get("family")))
        shapes = () if family is None else tuple(task.kwargs.get(field.name) for field in fields(family))  # type: ignore[arg-type]
        return "family", spec.id, shapes
    if spec.entry_point is None:
        return "vector", task.client
    return "single", task.action_space.shape, task.action_space.dtype


def _part(tasks: Sequence[Task], copies: int, squash: bool, episode_limit: int, shed: EnvCache | None) -> ClientEnvs:
    """The lanes of tasks of one kind."""
    first, spec = tasks[0], find_env_spec(tasks[0])
    if spec.vector_entry_point == FAMILY and not is_wrapped(first):
        return VectorEnvs(_family(tasks, copies), tasks, squash, episode_limit)
    if spec.entry_point is not None:
        return LoopEnvs(tasks, copies, squash, episode_limit, shed)
    env = make_vector_env(first, copies, episode_step_limit(first, episode_limit))
    mode = env.metadata.get("autoreset_mode")
    if mode == AutoresetMode.DISABLED:
        return VectorEnvs(env, tasks, squash, episode_limit)
    if mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        return AutoresetEnvs(env, first, squash)
    raise ValueError(
        f"client {first.client}: {first.env}: metadata['autoreset_mode'] of its vector environment is {mode!r}; it must"
        " be a gymnasium.vector.AutoresetMode"
    )


def _family(tasks: Sequence[Task], copies: int) -> Vector:
    """All copies of tasks of a family in one vector environment: every parameter as a list with one for each lane."""
    names = dict.fromkeys(name for task in tasks for name in task.kwargs)
    each = {name: [task.kwargs.get(name) for task in tasks for _ in range(copies)] for name in names}
    more = {"autoreset_mode": AutoresetMode.DISABLED, "max_episode_steps": NO_STEP_LIMIT}  # lanes count the steps
    return make_vector_env(replace(tasks[0], kwargs={**each, **more}), copies * len(tasks), None)
