"""From a scenario's `[[clients]]` to tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces.utils import flatdim

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ClientSettings, PolicySettings
from grpo_fed.tasks.gym import find_env_spec, find_registered_spec, make_env, make_vector_env
from grpo_fed.tasks.task import ActionSpec, EnvConfig, MissingPackageError, Space, Task

# From the scenario to tasks ------------------------------------------------------------------------------------------


def resolve_tasks(scenario: Scenario) -> list[Task]:
    """All clients' tasks, in the scenario's order; ValueError lists what is wrong with every entry of `clients`."""
    tasks, mistakes = _found(scenario)
    _refuse(mistakes)
    return tasks


def resolve_available_tasks(scenario: Scenario) -> list[Task]:
    """Those whose libraries are on this machine; ValueError for what is wrong with them."""
    tasks, mistakes = _found(scenario)
    _refuse([mistake for mistake in mistakes if not isinstance(mistake, MissingPackageError)])
    return tasks


def resolve_task(scenario: Scenario, client: str) -> Task:
    """One client's; nothing is asked of the others' environments."""
    (settings,) = (settings for settings in scenario.clients if client in settings.names)
    (task,) = _tasks(settings, scenario, client)
    return task


def _found(scenario: Scenario) -> tuple[list[Task], list[ValueError]]:
    """The tasks of all entries of `clients` that are right, and what is wrong with the others."""
    tasks: list[Task] = []
    mistakes: list[ValueError] = []
    for settings in scenario.clients:
        try:
            tasks.extend(_tasks(settings, scenario))
        except ValueError as error:
            mistakes.append(error)
    return tasks, mistakes


def _refuse(mistakes: Sequence[ValueError]) -> None:
    """All of them in one."""
    if mistakes:
        kind = (
            MissingPackageError if all(isinstance(mistake, MissingPackageError) for mistake in mistakes) else ValueError
        )
        raise kind("\n".join(map(str, mistakes)))


def _tasks(settings: ClientSettings, scenario: Scenario, only: str | None = None) -> Iterator[Task]:
    """The `count` clients of one entry, or only one of them."""
    seen: tuple[Space, Space] | None = None
    for number, client in enumerate(settings.names):
        if only not in (None, client):
            continue
        kwargs = {**settings.kwargs, **_spread(settings, number)}
        limit = _limit(client, find_registered_spec(client, settings.env), kwargs)
        recipe = EnvConfig(client, settings.env, kwargs, tuple(settings.wrappers), limit)
        if seen is None or settings.spread:
            seen = _spaces(recipe)
        where = f"client {client}: {settings.env}"
        yield Task(
            **vars(recipe),
            observation_size=_observation_size(where, seen[0]),
            action=_action(where, seen[1]),
            observation_space=seen[0],
            action_space=seen[1],
            learning_rate=_given(settings.learning_rate, scenario.objective.learning_rate),
            entropy=_given(settings.entropy, scenario.objective.entropy),
            penalty=_given(settings.penalty, scenario.penalty.weight),
        )


def _given(own: float | None, common: float) -> float:
    return common if own is None else own


def _spread(settings: ClientSettings, number: int) -> dict[str, float]:
    """Arguments of the `number`-th client that lie between two values, evenly."""
    share = number / max(settings.count - 1, 1)
    # twelve digits, so that halfway from 0.1 to 0.5 is 0.3 and not 0.30000000000000004
    return {name: float(f"{low + share * (high - low):.12g}") for name, (low, high) in settings.spread.items()}


def _limit(client: str, spec: EnvSpec, kwargs: dict[str, Any]) -> int:
    """The task's own limit of an episode; takes it out of kwargs, where gymnasium lets one give another."""
    limit = kwargs.pop("max_episode_steps", spec.max_episode_steps)
    if limit is None or limit == -1:
        return 0
    if not isinstance(limit, int) or limit < 1:
        text = "must be 1 or more, or -1 for no limit"
        raise ValueError(f"client {client}: kwargs.max_episode_steps = {limit!r}: {text}")
    return limit


def _spaces(recipe: EnvConfig) -> tuple[Space, Space]:
    """Make one copy, see what it observes and does, and close it."""
    if find_env_spec(recipe).entry_point is None:
        vector = make_vector_env(recipe, 1, recipe.episode_limit)
        vector.close()
        return vector.single_observation_space, vector.single_action_space
    env = make_env(recipe)
    env.close()
    return env.observation_space, env.action_space


# What a task sees and does -------------------------------------------------------------------------------------------


def _observation_size(where: str, space: Space) -> int:
    """D; ValueError if observations do not flatten to numbers."""
    bad = next(_unflattenable(space), None)
    if bad is None:
        try:
            size = int(flatdim(space))
        except (NotImplementedError, ValueError):
            bad = space
        else:
            if size > 0:
                return size
    raise ValueError(
        f"{where}: observations from {bad or space} are no fixed number of numbers; put a wrapper around it"
        " that makes a Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of them"
    )


def _unflattenable(space: Space) -> Iterator[Space]:
    """Spaces inside this one that are no fixed number of numbers."""
    if isinstance(space, spaces.Text | spaces.Graph | spaces.Sequence):
        yield space
    elif isinstance(space, spaces.Dict | spaces.Tuple | spaces.OneOf):
        for inner in space.values() if isinstance(space, spaces.Dict) else space.spaces:
            yield from _unflattenable(inner)


def _action(where: str, space: Space) -> ActionSpec:
    """What actions of a space are; ValueError for a space that no policy of ours has actions for."""
    match space:
        case spaces.Discrete():
            return ActionSpec("categorical", (int(space.n),), (int(space.start),))
        case spaces.MultiDiscrete() if space.nvec.size:
            sizes, start = space.nvec.ravel().tolist(), space.start.ravel().tolist()
            return ActionSpec("multi-categorical", tuple(sizes), tuple(start))
        case spaces.MultiBinary() if math.prod(space.shape):
            components = math.prod(space.shape)
            return ActionSpec("multi-categorical", (2,) * components, (0,) * components)
        case spaces.Box() if math.prod(space.shape):
            low = np.where(space.bounded_below, space.low, -np.inf).ravel().tolist()
            high = np.where(space.bounded_above, space.high, np.inf).ravel().tolist()
            return ActionSpec("gaussian", (math.prod(space.shape),), (), tuple(low), tuple(high))
    raise ValueError(
        f"{where}: no policy has actions for {space}; put a wrapper around it that makes a Discrete, MultiDiscrete,"
        " MultiBinary or Box"
    )


def group_by_policy_shape(tasks: Iterable[Task], policy: PolicySettings) -> list[list[Task]]:
    """Group tasks whose policies have the same shapes, so that one stacked learner can train a group."""
    groups: list[list[Task]] = []
    for task in tasks:
        group = next((group for group in groups if _fits_same_policy(task, group[0], policy)), None)
        if group is None:
            groups.append([task])
        else:
            group.append(task)
    return groups


def _fits_same_policy(task: Task, other: Task, policy: PolicySettings) -> bool:
    """Whether one policy fits both tasks; a user's own module may depend on more of the spaces than their sizes."""
    spaces = (task.observation_space, task.action_space) == (other.observation_space, other.action_space)
    return task.signature == other.signature and (spaces or policy.module is None)
