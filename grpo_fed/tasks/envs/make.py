"""make_client_envs: chooses how the environments of some tasks are stepped, and joins the ways into one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import fields, replace

import numpy as np
from gymnasium.vector import AutoresetMode

from grpo_fed.tasks.action_spaces import action_form
from grpo_fed.tasks.curriculum import spread_levels
from grpo_fed.tasks.envs.base import ClientEnvs, Level, episode_step_limit
from grpo_fed.tasks.envs.cache import EnvCache
from grpo_fed.tasks.envs.loop import LoopEnvs
from grpo_fed.tasks.envs.mixed import MixedEnvs, copy_indices
from grpo_fed.tasks.envs.vector import AutoresetEnvs, VectorEnvs
from grpo_fed.tasks.families import FAMILIES
from grpo_fed.tasks.families.environments import UNLIMITED
from grpo_fed.tasks.gym import find_env_spec, is_wrapped, make_vector_env
from grpo_fed.tasks.gym_task import GymTask, VectorEnv

FAMILY_ENTRY_POINT = "grpo_fed.tasks.families.environments:make_family_vector_env"
"""The vector entry point that all families of this package are registered with."""


def make_client_envs(
    tasks: Sequence[GymTask],
    num_envs: int,
    squash: bool = False,
    episode_limit: int = 0,
    cache: EnvCache | None = None,
    cost_key: str | None = None,
    episodes: int | None = None,
) -> ClientEnvs:
    """Make `num_envs` copies of each task, to be stepped together.

    squash: map actions onto their box by tanh. episode_limit: steps after which episodes are truncated, besides the
    tasks' own limits; 0 for none. cache: where single environments are taken from, and put when the result is closed;
    the caller closes the cache. cost_key: the key of a step's info with its cost; None to read no cost.
    episodes: how many are played of each task; levels are then spread over the copies that play them.

    ValueError if the tasks do not have one signature, or an action cannot be squashed.
    """
    clients_by_kind: dict[Hashable, list[int]] = defaultdict(list)
    for client, task in enumerate(tasks):
        _check_same_signature(task, tasks[0])
        if squash:
            _check_bounded(task)
        clients_by_kind[_stepping_kind(task)].append(client)
    parts = []
    for clients in clients_by_kind.values():
        envs = _make_part([tasks[client] for client in clients], num_envs, squash, episode_limit, cache, cost_key)
        parts.append((envs, copy_indices(clients, num_envs)))
    made = parts[0][0] if len(parts) == 1 else MixedEnvs(parts)
    made.set_levels(spread_over_copies(tasks, num_envs, episodes or num_envs))
    return made


def spread_over_copies(tasks: Sequence[GymTask], num_envs: int, episodes: int) -> dict[int, Level]:
    """Spread levels over the copies of each task that has some: the level of each of these copies.

    episodes: how many are played; of more copies than that the levels repeat, so that these episodes are spread too.
    """
    levels: dict[int, Level] = {}
    for client, task in enumerate(tasks):
        if task.curriculum is not None and task.curriculum.names:
            spread = min(num_envs, episodes)
            rows = spread_levels(task.curriculum, spread)[np.arange(num_envs) % spread]
            levels |= name_levels(task.curriculum.names, rows, client * num_envs)
    return levels


def name_levels(names: Sequence[str], levels: np.ndarray, first: int) -> dict[int, Level]:
    """Name the values of levels [N, P], which are those of the env copies from `first` on."""
    return {first + copy: dict(zip(names, level, strict=True)) for copy, level in enumerate(levels.tolist())}


def _check_same_signature(task: GymTask, first: GymTask) -> None:
    if task.signature != first.signature:
        shapes = [f"{differing.env} has (observations, actions) {differing.signature}" for differing in (first, task)]
        raise ValueError(f"clients {first.client} and {task.client} cannot be stepped together: {', '.join(shapes)}")


def _check_bounded(task: GymTask) -> None:
    for entry, (low, high) in enumerate(zip(task.action.low, task.action.high, strict=True)):
        if not np.isfinite(high - low):
            raise ValueError(
                f"policy.squash = true: client {task.client}: entry {entry} of the actions of {task.env} goes from"
                f" {low} to {high}, which tanh cannot be stretched to; set policy.squash = false, or bound the actions"
                " with a wrapper"
            )


def _is_plain_family(task: GymTask) -> bool:
    """Return whether a task is one of a family, without wrappers."""
    return find_env_spec(task).vector_entry_point == FAMILY_ENTRY_POINT and not is_wrapped(task)


def _stepping_kind(task: GymTask) -> Hashable:
    """Return a key that is equal for tasks that one LoopEnvs, VectorEnvs or AutoresetEnvs can step."""
    spec = find_env_spec(task)
    if _is_plain_family(task):
        family = FAMILIES.get(str(spec.kwargs.get("family")))
        shape_fields = () if family is None else tuple(task.kwargs.get(field.name) for field in fields(family))  # type: ignore[arg-type]
        return "family", spec.id, shape_fields
    if spec.entry_point is None:
        return "vector", task.client
    return "single", action_form(task.action_space)


def _make_part(
    tasks: Sequence[GymTask],
    num_envs: int,
    squash: bool,
    episode_limit: int,
    cache: EnvCache | None,
    cost_key: str | None,
) -> ClientEnvs:
    """Make the env copies of tasks of one kind."""
    first = tasks[0]
    if _is_plain_family(first):
        return VectorEnvs(_make_family_env(tasks, num_envs), tasks, squash, episode_limit, cost_key)
    if find_env_spec(first).entry_point is not None:
        return LoopEnvs(tasks, num_envs, squash, episode_limit, cache, cost_key)
    env = make_vector_env(first, num_envs, episode_step_limit(first, episode_limit))
    mode = env.metadata.get("autoreset_mode")
    if mode == AutoresetMode.DISABLED:
        return VectorEnvs(env, tasks, squash, episode_limit, cost_key)
    if mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        return AutoresetEnvs(env, first, squash, cost_key)
    raise ValueError(
        f"client {first.client}: {first.env}: metadata['autoreset_mode'] of its vector environment is {mode!r}; it must"
        " be a gymnasium.vector.AutoresetMode"
    )


def _make_family_env(tasks: Sequence[GymTask], num_envs: int) -> VectorEnv:
    """Make one vector environment of all copies of a family's tasks; it gets each parameter as a list by copy."""
    names = dict.fromkeys(name for task in tasks for name in task.kwargs)
    parameters = {name: [task.kwargs.get(name) for task in tasks for _ in range(num_envs)] for name in names}
    settings = {"autoreset_mode": AutoresetMode.DISABLED, "max_episode_steps": UNLIMITED}  # VectorEnvs counts the steps
    return make_vector_env(replace(tasks[0], kwargs={**parameters, **settings}), num_envs * len(tasks), None)
