"""From a scenario's `[[clients]]` to tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces.utils import flatdim

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ClientSettings, CurriculumSettings, PolicySettings
from grpo_fed.scenario.toml.text import suggest_name
from grpo_fed.tasks.action_spaces import describe_actions
from grpo_fed.tasks.curriculum import Curriculum
from grpo_fed.tasks.envs.base import missing_cost_error
from grpo_fed.tasks.families import FAMILIES
from grpo_fed.tasks.gym import find_env_spec, find_registered_spec, make_env, make_vector_env
from grpo_fed.tasks.gym_task import Env, EnvConfig, EnvWrapper, GymTask, Space, VectorEnv
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.prompts import open_prompts
from grpo_fed.tasks.rewards import open_rewards
from grpo_fed.tasks.scores import check_scales
from grpo_fed.tasks.task import MissingPackageError, Task

# From the scenario to tasks ------------------------------------------------------------------------------------------


def resolve_tasks(scenario: Scenario) -> list[Task]:
    """Make the tasks of all clients, in the scenario's order.

    ValueError lists what is wrong with every entry of `[[clients]]`, with its prompts and rewards as well.
    """
    check_scales(scenario)
    tasks, mistakes = _resolve_entries(scenario)
    _raise_all([*mistakes, *_text_mistakes(scenario)])
    return tasks


def resolve_available_tasks(scenario: Scenario) -> list[Task]:
    """Make the tasks whose packages are installed on this machine; ValueError for anything else that is wrong.

    Prompts and rewards are not opened: they belong to the clients.
    """
    check_scales(scenario)
    tasks, mistakes = _resolve_entries(scenario)
    _raise_all([mistake for mistake in mistakes if not isinstance(mistake, MissingPackageError)])
    return tasks


def resolve_task(scenario: Scenario, client: str) -> Task:
    """Make the task of one client, without making an environment of any other client."""
    (settings,) = (settings for settings in scenario.clients if client in settings.names)
    (task,) = _tasks_of_entry(settings, scenario, client)
    return task


def resolve_gym_tasks(scenario: Scenario) -> list[GymTask]:
    """Make the tasks of a scenario whose clients all have environments; ValueError as from `resolve_tasks`."""
    tasks = [task for task in resolve_tasks(scenario) if isinstance(task, GymTask)]
    assert len(tasks) == sum(settings.count for settings in scenario.clients), "all clients have environments"
    return tasks


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
    if not isinstance(task, GymTask) or not isinstance(other, GymTask):
        return task.signature == other.signature
    spaces = (task.observation_space, task.action_space) == (other.observation_space, other.action_space)
    return task.signature == other.signature and (spaces or policy.module is None)


def _resolve_entries(scenario: Scenario) -> tuple[list[Task], list[ValueError]]:
    """Make the tasks of all valid entries of `[[clients]]`, and collect what is wrong with the others."""
    tasks: list[Task] = []
    mistakes: list[ValueError] = []
    for settings in scenario.clients:
        try:
            tasks.extend(_tasks_of_entry(settings, scenario))
        except ValueError as error:
            mistakes.append(error)
    return tasks, mistakes


def _text_mistakes(scenario: Scenario) -> Iterator[ValueError]:
    """Open prompts and rewards of all entries that have some, and find what is wrong with them."""
    for settings in scenario.clients:
        for open_part in (open_prompts, open_rewards) if settings.prompts is not None else ():
            try:
                open_part(settings.names[0], settings)
            except ValueError as error:
                yield error


def _raise_all(mistakes: Sequence[ValueError]) -> None:
    """Raise one error that lists all mistakes, if there are any."""
    if mistakes:
        only_packages = all(isinstance(mistake, MissingPackageError) for mistake in mistakes)
        error_type = MissingPackageError if only_packages else ValueError
        raise error_type("\n".join(map(str, mistakes)))


def _tasks_of_entry(settings: ClientSettings, scenario: Scenario, only: str | None = None) -> Iterator[Task]:
    """Make the tasks of an entry's `count` clients, or that of the client `only`, each with its changes."""
    if settings.env is None:
        for client in settings.names if only is None else (only,):
            own = {**_own_settings(settings, scenario), "language": scenario.language, "settings": settings}
            yield LanguageTask(client, **own)
        return
    known_spaces: dict[int, tuple[Space, Space]] = {}
    for index, client in enumerate(settings.names):
        if only not in (None, client):
            continue
        first, *changed = _tasks_of_client(settings, scenario, index, {} if settings.spread else known_spaces)
        for task in changed:
            _check_same_policy(first, task, scenario.policy)
        yield replace(first, changes=tuple(changed))


def _tasks_of_client(
    settings: ClientSettings, scenario: Scenario, index: int, known_spaces: dict[int, tuple[Space, Space]]
) -> Iterator[GymTask]:
    """Make the task that the `index`-th client of an entry begins with, and then the one after each of its changes.

    known_spaces: the spaces of environments that were made before, by the round of the change; new ones are added.
    """
    client, env = settings.names[index], settings.env
    assert env is not None, "the entry's clients have environments"
    given = [
        EnvWrapper(each) if isinstance(each, str) else EnvWrapper(each.path, each.kwargs) for each in settings.wrappers
    ]
    wrappers = (*given, *HOSTILE_WRAPPERS.get(settings.attack, ()))
    for since in (0, *(change.round for change in settings.changes)):
        kwargs = kwargs_in_round(settings, index, since)
        where = f"client {client}: changes from round {since} on" if since else f"client {client}"
        limit = _take_episode_limit(where, find_registered_spec(client, env), kwargs)
        config = EnvConfig(client, env, kwargs, wrappers, limit)
        if since not in known_spaces:
            known_spaces[since] = _find_spaces_in_round(config, since, cost_key(scenario))
            _check_levels(config, settings.curriculum, known_spaces[since])
        observation_space, action_space = known_spaces[since]
        yield GymTask(
            **vars(config),
            observation_size=_observation_size(f"{where}: {env}", observation_space),
            action=describe_actions(f"{where}: {env}", action_space),
            observation_space=observation_space,
            action_space=action_space,
            **_own_settings(settings, scenario),
            since=since,
            curriculum=None if settings.curriculum is None else Curriculum(settings.curriculum),
        )


def _check_levels(config: EnvConfig, levels: CurriculumSettings | None, spaces: tuple[Space, Space]) -> None:
    """Raise ValueError if an environment cannot have the levels of its curriculum, or has other spaces with them."""
    if levels is None or not (levels.ranges or levels.kind == "replay"):
        return
    where = f"client {config.client}: curriculum.ranges"
    if find_env_spec(config).entry_point is None:
        raise ValueError(
            f"{where}: {config.env} is registered as a vector environment only, whose copies are all alike; leave"
            " curriculum out, or register an entry_point for it"
        )
    family = FAMILIES.get(str(find_env_spec(config).kwargs.get("family")))
    for name in levels.ranges:
        if family is not None and name not in family.parameters:
            raise ValueError(f"{where}: {name}: no number of {config.env}{suggest_name(name, family.parameters)}")
    for corner in (0, 1) if levels.ranges else ():
        level = {name: ends[corner] for name, ends in levels.ranges.items()}
        try:
            found = _find_spaces(replace(config, kwargs={**config.kwargs, **level}))
        except ValueError as error:
            raise type(error)(f"{error} (at {level} of curriculum.ranges)") from error
        if found != spaces:
            raise ValueError(
                f"{where}: at {level} {config.env} has other spaces, and one policy cannot act in both; name only"
                " arguments that leave the spaces as they are"
            )


HOSTILE_WRAPPERS = {
    "negated-reward": (EnvWrapper("grpo_fed.tasks.wrappers:NegatedReward"),),
    "random-action": (EnvWrapper("grpo_fed.tasks.wrappers:RandomAction"),),
}
"""The wrapper with which a hostile client learns something else, by its attack."""


def _own_settings(settings: ClientSettings, scenario: Scenario) -> dict[str, Any]:
    """Return the values of a `Task` that an entry may have for itself."""
    return {
        "learning_rate": _value_or_default(settings.learning_rate, scenario.objective.learning_rate),
        "entropy": _value_or_default(settings.entropy, scenario.objective.entropy),
        "penalty": _value_or_default(settings.penalty, scenario.penalty.weight),
        "reward_scale": _value_or_default(settings.reward_scale, scenario.rollout.reward_scale),
    }


def cost_key(scenario: Scenario) -> str | None:
    """Return the key of infos with the cost of a step; None in a scenario that limits none."""
    cost = scenario.objective.cost
    return None if cost.limit is None else cost.key


def _find_spaces_in_round(config: EnvConfig, round: int, cost: str | None) -> tuple[Space, Space]:
    """Return the spaces of an environment; an error names the round of a change, 0 for none.

    cost: the key of infos whose presence is checked too; None for none.
    """
    try:
        return _find_spaces(config, cost)
    except ValueError as error:
        if not round:
            raise
        raise type(error)(f"{error} (changes, from round {round} on)") from error


def kwargs_in_round(settings: ClientSettings, index: int, round: int) -> dict[str, Any]:
    """Return the arguments of the environment that the `index`-th client of an entry has in a round."""
    kwargs = {**settings.kwargs, **_spread_kwargs(settings, index)}
    for change in settings.changes:
        if change.round <= round:
            kwargs |= change.kwargs
    return kwargs


def _check_same_policy(first: GymTask, changed: GymTask, policy: PolicySettings) -> None:
    """Raise ValueError if the policy of a client's first task does not fit the task after a change."""
    if _fits_same_policy(first, changed, policy):
        return
    spaces = [f"{task.observation_space} and {task.action_space}" for task in (first, changed)]
    raise ValueError(
        f"client {first.client}: changes: from round {changed.since} on {first.env} has the spaces {spaces[1]}, before"
        f" {spaces[0]}, and one policy cannot act in both; change only arguments that leave the spaces as they are"
    )


def _value_or_default(value: float | None, default: float) -> float:
    return default if value is None else value


def _spread_kwargs(settings: ClientSettings, index: int) -> dict[str, float]:
    """Return the arguments that `spread` places evenly between two values, for the `index`-th client of an entry."""
    share = index / max(settings.count - 1, 1)
    # twelve digits, so that halfway from 0.1 to 0.5 is 0.3 and not 0.30000000000000004
    return {name: float(f"{low + share * (high - low):.12g}") for name, (low, high) in settings.spread.items()}


def _take_episode_limit(where: str, spec: EnvSpec, kwargs: dict[str, Any]) -> int:
    """Return the task's own step limit, 0 for none, and remove it from kwargs, where gymnasium lets users set it."""
    limit = kwargs.pop("max_episode_steps", spec.max_episode_steps)
    if limit is None or limit == -1:
        return 0
    if not isinstance(limit, int) or limit < 1:
        text = "must be 1 or more, or -1 for no limit"
        raise ValueError(f"{where}: kwargs.max_episode_steps = {limit!r}: {text}")
    return limit


# The spaces of a task ------------------------------------------------------------------------------------------------


def _find_spaces(config: EnvConfig, cost: str | None = None) -> tuple[Space, Space]:
    """Return an environment's observation and action space; one copy is made for this, and closed.

    cost: the key of infos that a step of it must have; None to make no step.
    """
    if find_env_spec(config).entry_point is None:
        vector = make_vector_env(config, 1, config.episode_limit)
        if cost is not None:
            _check_cost(config, vector, cost)
        vector.close()
        return vector.single_observation_space, vector.single_action_space
    env = make_env(config)
    if cost is not None:
        _check_cost(config, env, cost)
    env.close()
    return env.observation_space, env.action_space


def _check_cost(config: EnvConfig, env: Env | VectorEnv, key: str) -> None:
    """Raise ValueError unless the info of a first step has a cost; the environment is closed then."""
    try:
        env.reset(seed=0)
        env.action_space.seed(0)
        info = env.step(env.action_space.sample())[-1]
        if key not in info:
            raise missing_cost_error(key, (name for name in info if not str(name).startswith("_")))
    except Exception as error:
        env.close()
        text = "" if isinstance(error, ValueError) else "cannot be stepped to look for a cost: "
        raise ValueError(f"client {config.client}: {config.env}: {text}{error}") from error


def _observation_size(where: str, space: Space) -> int:
    """Return D, the size of a flattened observation; ValueError if observations do not flatten to D numbers."""
    bad = next(_unflattenable_parts(space), None)
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


def _unflattenable_parts(space: Space) -> Iterator[Space]:
    """Find the spaces inside this one whose samples are no fixed number of numbers."""
    if isinstance(space, spaces.Text | spaces.Graph | spaces.Sequence):
        yield space
    elif isinstance(space, spaces.Dict | spaces.Tuple | spaces.OneOf):
        for inner in space.values() if isinstance(space, spaces.Dict) else space.spaces:
            yield from _unflattenable_parts(inner)
