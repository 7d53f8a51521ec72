"""Tasks: which environment each client has, what it sees and does there, and how a copy of it is made."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator, parse_env_id
from gymnasium.error import DependencyNotInstalled
from gymnasium.spaces.utils import flatdim
from gymnasium.vector import VectorEnv

import grpo_fed.tasks.families  # noqa: F401, importing it registers `grpo_fed/CartPole-v1` and its like
from grpo_fed.scenario.importing import imported, said
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ClientSettings

Env: TypeAlias = gymnasium.Env[Any, Any]
Vector: TypeAlias = VectorEnv[Any, Any, Any]
Space: TypeAlias = gymnasium.Space[Any]

ENDLESS = 2**31 - 1
"""Steps of an episode that nothing cuts, for what wants a number."""
EXTRAS = ("box2d", "mujoco", "metaworld")
"""Packages with environments that `pip install 'grpo-fed[...]'` brings."""


Kind: TypeAlias = Literal["categorical", "multi-categorical", "gaussian"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class NotHere(ValueError):
    """A task cannot be made, because a library that it needs is not on this machine; it may be on the client's."""


@dataclass(frozen=True)
class Form:
    """What whoever cannot make a task must know of it to know its policy."""

    observation_size: int
    """D: entries of a flattened observation."""
    kind: Kind
    """Of its actions."""
    sizes: tuple[int, ...]
    """Of its actions."""
    episode_limit: int
    """Steps after which the task itself truncates an episode; 0 for never."""


@dataclass(frozen=True)
class Action:
    """What an action of a task is, whatever the shape that its environment wants it in."""

    kind: Kind
    """One choice, several choices, or real numbers."""
    sizes: tuple[int, ...]
    """How many there are to choose from, for each choice; or (A,) for A real numbers."""
    start: tuple[int, ...] = ()
    """The number of the first thing to choose, for each choice."""
    low: tuple[float, ...] = ()
    """The least of each real number; -inf where there is none."""
    high: tuple[float, ...] = ()
    """The greatest of each real number; inf where there is none."""

    @property
    def size(self) -> int:
        """A: entries of an action."""
        return self.sizes[0] if self.kind == "gaussian" else len(self.sizes)


@dataclass(frozen=True)
class Recipe:
    """What it takes to make a client's environment."""

    client: str
    """The client's name."""
    env: str
    """A gymnasium id, or `module:EnvId`."""
    kwargs: Mapping[str, Any]
    """Arguments for the environment."""
    wrappers: tuple[str, ...]
    """Import paths, innermost first."""
    episode_limit: int
    """Steps after which the task itself truncates an episode; 0 for never."""

    @property
    def spec(self) -> EnvSpec:
        """What gymnasium knows of it."""
        return spec_of(self.client, self.env)

    @property
    def wrapped(self) -> bool:
        """Whether anything stands around it: wrappers of the scenario's, or of its registration's."""
        return bool(self.wrappers or self.spec.additional_wrappers)


@dataclass(frozen=True)
class Task(Recipe):
    """One client's environment with what it is like, and how the client learns there."""

    observation_size: int
    """D: entries of a flattened observation."""
    action: Action
    observation_space: Space
    action_space: Space
    learning_rate: float
    entropy: float
    """Weight of the entropy bonus."""
    penalty: float
    """Weight of the group penalty."""

    @property
    def signature(self) -> tuple[object, ...]:
        """Tasks with equal ones can be learned by equally shaped policies."""
        return self.observation_size, self.action.kind, self.action.sizes

    @property
    def form(self) -> Form:
        """What others must know of it."""
        return Form(self.observation_size, self.action.kind, self.action.sizes, self.episode_limit)


class TaskError(RuntimeError):
    """A client's environment failed while it was played."""

    def __init__(self, client: str, env: str, what: str) -> None:
        super().__init__(client, env, what)  # all three, so that it survives the way out of another process
        self.client = client
        self.env = env
        self.what = what

    def __str__(self) -> str:
        return f"client {self.client}: {self.env}: {self.what}"


# From the scenario to tasks ------------------------------------------------------------------------------------------


def tasks_of(scenario: Scenario) -> list[Task]:
    """All clients' tasks, in the scenario's order; ValueError lists what is wrong with every entry of `clients`."""
    tasks, mistakes = _found(scenario)
    _refuse(mistakes)
    return tasks


def tasks_here(scenario: Scenario) -> list[Task]:
    """Those whose libraries are on this machine; ValueError for what is wrong with them."""
    tasks, mistakes = _found(scenario)
    _refuse([mistake for mistake in mistakes if not isinstance(mistake, NotHere)])
    return tasks


def task_of(scenario: Scenario, client: str) -> Task:
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
        kind = NotHere if all(isinstance(mistake, NotHere) for mistake in mistakes) else ValueError
        raise kind("\n".join(map(str, mistakes)))


def _tasks(settings: ClientSettings, scenario: Scenario, only: str | None = None) -> Iterator[Task]:
    """The `count` clients of one entry, or only one of them."""
    seen: tuple[Space, Space] | None = None
    for number, client in enumerate(settings.names):
        if only not in (None, client):
            continue
        kwargs = {**settings.kwargs, **_spread(settings, number)}
        limit = _limit(client, spec_of(client, settings.env), kwargs)
        recipe = Recipe(client, settings.env, kwargs, tuple(settings.wrappers), limit)
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


def _spaces(recipe: Recipe) -> tuple[Space, Space]:
    """Make one copy, see what it observes and does, and close it."""
    if recipe.spec.entry_point is None:
        vector = make_vector(recipe, 1, recipe.episode_limit)
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


def _action(where: str, space: Space) -> Action:
    """What actions of a space are; ValueError for a space that no policy of ours has actions for."""
    match space:
        case spaces.Discrete():
            return Action("categorical", (int(space.n),), (int(space.start),))
        case spaces.MultiDiscrete() if space.nvec.size:
            sizes, start = space.nvec.ravel().tolist(), space.start.ravel().tolist()
            return Action("multi-categorical", tuple(sizes), tuple(start))
        case spaces.MultiBinary() if math.prod(space.shape):
            components = math.prod(space.shape)
            return Action("multi-categorical", (2,) * components, (0,) * components)
        case spaces.Box() if math.prod(space.shape):
            low = np.where(space.bounded_below, space.low, -np.inf).ravel().tolist()
            high = np.where(space.bounded_above, space.high, np.inf).ravel().tolist()
            return Action("gaussian", (math.prod(space.shape),), (), tuple(low), tuple(high))
    raise ValueError(
        f"{where}: no policy has actions for {space}; put a wrapper around it that makes a Discrete, MultiDiscrete,"
        " MultiBinary or Box"
    )


# Making copies of a task ---------------------------------------------------------------------------------------------


def make_env(recipe: Recipe, render_mode: str | None = None, lean: bool = False) -> Env:
    """One copy of a task.

    A lean one comes without gymnasium's own wrappers, so without a limit on its episodes, unless something stands
    around it that may look for them.
    """
    spec = copy.copy(recipe.spec)
    limit = recipe.episode_limit
    kwargs = dict(recipe.kwargs) if render_mode is None else {**recipe.kwargs, "render_mode": render_mode}
    if lean and not recipe.wrapped:
        spec.order_enforce = False
        limit = 0
    try:
        env: Env = gymnasium.make(spec, max_episode_steps=limit or -1, disable_env_checker=True, **kwargs)
    except Exception as error:
        raise _unmade(recipe, kwargs, spec.entry_point, error) from error
    for path in recipe.wrappers:
        env = _wrap(recipe.client, path, env)
    return env


def make_vector(recipe: Recipe, lanes: int, limit: int | None) -> Vector:
    """`lanes` copies of a task in its own vector environment, which is told to cut episodes after `limit` steps."""
    spec, where = recipe.spec, f"client {recipe.client}: {recipe.env}"
    if recipe.wrappers:
        raise ValueError(
            f"{where}: wrappers = {list(recipe.wrappers)}: it is registered as a vector environment only, which no"
            " wrapper fits around; leave wrappers out, or register an entry_point for it"
        )
    kwargs = dict(recipe.kwargs)
    if limit is not None and limit != (spec.max_episode_steps or 0):
        kwargs["max_episode_steps"] = limit or ENDLESS
    try:
        env: Vector = gymnasium.make_vec(spec, lanes, **kwargs)
    except Exception as error:
        raise _unmade(recipe, kwargs, spec.vector_entry_point, error) from error
    if env.num_envs != lanes:
        raise ValueError(f"{where}: asked for {lanes} copies, it made {env.num_envs}")
    return env


def _wrap(client: str, path: str, env: Env) -> Env:
    where = f"client {client}: wrappers: {path}"
    try:
        wrapper = imported(path)
    except ValueError as error:
        raise _kind(error.__cause__)(f"{where}: {error}") from error
    try:
        wrapped: Env = wrapper(env)
    except Exception as error:
        raise _kind(error)(f"{where}: {said(error)}") from error
    if not isinstance(wrapped, gymnasium.Env):
        raise ValueError(f"{where}: makes {type(wrapped).__name__}, which is no gymnasium.Env")
    return wrapped


def spec_of(client: str, env: str) -> EnvSpec:
    """What gymnasium knows of an id, after importing `module:` before it; without -vN, of the latest version."""
    where = f"client {client}: env = {env!r}"
    module, colon, name = env.partition(":")
    if not colon:
        name = env
    elif module not in sys.modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == module
            cure = f": pip install 'grpo-fed[{module}]'" if absent and module in EXTRAS else ""
            raise _kind(error)(f"{where}: {module} cannot be imported: {said(error)}{cure}") from error
    found = gymnasium.registry.get(name)
    if found is None:
        try:
            namespace, bare, version = parse_env_id(name)
        except gymnasium.error.Error:
            raise ValueError(f"{where}: {name!r} is no gymnasium id; they look like CartPole-v1") from None
        known = [one for one in gymnasium.registry.values() if (one.namespace, one.name) == (namespace, bare)]
        if version is not None or not known:
            others = namespace is not None and all(one.namespace != namespace for one in gymnasium.registry.values())
            raise (NotHere if others else ValueError)(f"{where}: no such task is registered{_like(name)}")
        found = max(known, key=lambda one: one.version or 0)
    return found


def _like(name: str) -> str:
    """The cure for an id that is not registered."""
    by_lower = {known.lower(): known for known in gymnasium.registry}
    close = [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; if a package of yours registers it, put the package before it: my_package:{name}"


def _kind(error: BaseException | None) -> type[ValueError]:
    """Of what is raised instead."""
    return NotHere if isinstance(error, DependencyNotInstalled | ModuleNotFoundError) else ValueError


def _unmade(recipe: Recipe, kwargs: Mapping[str, Any], entry_point: object, error: Exception) -> ValueError:
    """Why an environment could not be made, and what to do."""
    where = f"client {recipe.client}: {recipe.env}"
    if isinstance(error, DependencyNotInstalled | ModuleNotFoundError):
        place = entry_point if isinstance(entry_point, str) else ""
        extra = next((name for name in EXTRAS if place.startswith(f"gymnasium.envs.{name}")), None)
        cure = f"pip install 'grpo-fed[{extra}]'" if extra else "install what is missing"
        return NotHere(f"{where}: needs a package that is not installed: {cure} ({error})")
    inner = error.__cause__ if isinstance(error.__cause__, TypeError) else error  # gymnasium wraps a TypeError in one
    text = f"{type(inner).__name__}: {inner}{_arguments(kwargs, entry_point)}"
    return ValueError(f"{where}: cannot be made with kwargs = {kwargs}: {text}")


def _arguments(kwargs: Mapping[str, Any], entry_point: object) -> str:
    """The cure for arguments that do not exist."""
    try:
        creator: Any = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
        parameters = inspect.signature(creator).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return ""
    known = [parameter.name for parameter in parameters if parameter.name not in ("num_envs", "render_mode")]
    unknown = [name for name in kwargs if name not in known]
    if not unknown or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ""
    close = difflib.get_close_matches(unknown[0], known, n=1)
    return f"; {unknown[0]}: did you mean {close[0]}?" if close else f"; it takes {', '.join(known) or 'none'}"
