"""Finds, makes and wraps gymnasium environments, and explains what is wrong where that fails."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator, parse_env_id
from gymnasium.error import DependencyNotInstalled

import grpo_fed.tasks.families  # noqa: F401, importing it registers `grpo_fed/CartPole-v1` and its like
from grpo_fed.scenario.importing import describe_exception, import_object
from grpo_fed.tasks.task import NO_STEP_LIMIT, Env, EnvConfig, MissingPackageError, Vector

EXTRAS = ("box2d", "mujoco", "metaworld")
"""Packages with environments that `pip install 'grpo-fed[...]'` brings."""


# Making copies of a task ---------------------------------------------------------------------------------------------


def make_env(recipe: EnvConfig, render_mode: str | None = None, lean: bool = False) -> Env:
    """One copy of a task.

    A lean one comes without gymnasium's own wrappers, so without a limit on its episodes, unless something stands
    around it that may look for them.
    """
    spec = copy.copy(find_env_spec(recipe))
    limit = recipe.episode_limit
    kwargs = dict(recipe.kwargs) if render_mode is None else {**recipe.kwargs, "render_mode": render_mode}
    if lean and not is_wrapped(recipe):
        spec.order_enforce = False
        limit = 0
    try:
        env: Env = gymnasium.make(spec, max_episode_steps=limit or -1, disable_env_checker=True, **kwargs)
    except Exception as error:
        raise _explain_failure(recipe, kwargs, spec.entry_point, error) from error
    for path in recipe.wrappers:
        env = _wrap(recipe.client, path, env)
    return env


def make_vector_env(recipe: EnvConfig, lanes: int, limit: int | None) -> Vector:
    """`lanes` copies of a task in its own vector environment, which is told to cut episodes after `limit` steps."""
    spec, where = find_env_spec(recipe), f"client {recipe.client}: {recipe.env}"
    if recipe.wrappers:
        raise ValueError(
            f"{where}: wrappers = {list(recipe.wrappers)}: it is registered as a vector environment only, which no"
            " wrapper fits around; leave wrappers out, or register an entry_point for it"
        )
    kwargs = dict(recipe.kwargs)
    if limit is not None and limit != (spec.max_episode_steps or 0):
        kwargs["max_episode_steps"] = limit or NO_STEP_LIMIT
    try:
        env: Vector = gymnasium.make_vec(spec, lanes, **kwargs)
    except Exception as error:
        raise _explain_failure(recipe, kwargs, spec.vector_entry_point, error) from error
    if env.num_envs != lanes:
        raise ValueError(f"{where}: asked for {lanes} copies, it made {env.num_envs}")
    return env


def _wrap(client: str, path: str, env: Env) -> Env:
    where = f"client {client}: wrappers: {path}"
    try:
        wrapper = import_object(path)
    except ValueError as error:
        raise _kind(error.__cause__)(f"{where}: {error}") from error
    try:
        wrapped: Env = wrapper(env)
    except Exception as error:
        raise _kind(error)(f"{where}: {describe_exception(error)}") from error
    if not isinstance(wrapped, gymnasium.Env):
        raise ValueError(f"{where}: makes {type(wrapped).__name__}, which is no gymnasium.Env")
    return wrapped


def find_env_spec(recipe: EnvConfig) -> EnvSpec:
    """Find what gymnasium knows of a client's environment; ValueError with a cure if it knows none of that name."""
    return find_registered_spec(recipe.client, recipe.env)


def is_wrapped(recipe: EnvConfig) -> bool:
    """Say whether anything stands around an environment: wrappers of the scenario's, or of its registration's."""
    return bool(recipe.wrappers or find_env_spec(recipe).additional_wrappers)


def find_registered_spec(client: str, env: str) -> EnvSpec:
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
            raise _kind(error)(f"{where}: {module} cannot be imported: {describe_exception(error)}{cure}") from error
    found = gymnasium.registry.get(name)
    if found is None:
        try:
            namespace, bare, version = parse_env_id(name)
        except gymnasium.error.Error:
            raise ValueError(f"{where}: {name!r} is no gymnasium id; they look like CartPole-v1") from None
        known = [one for one in gymnasium.registry.values() if (one.namespace, one.name) == (namespace, bare)]
        if version is not None or not known:
            others = namespace is not None and all(one.namespace != namespace for one in gymnasium.registry.values())
            raise (MissingPackageError if others else ValueError)(f"{where}: no such task is registered{_like(name)}")
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
    return MissingPackageError if isinstance(error, DependencyNotInstalled | ModuleNotFoundError) else ValueError


def _explain_failure(recipe: EnvConfig, kwargs: Mapping[str, Any], entry_point: object, error: Exception) -> ValueError:
    """Why an environment could not be made, and what to do."""
    where = f"client {recipe.client}: {recipe.env}"
    if isinstance(error, DependencyNotInstalled | ModuleNotFoundError):
        place = entry_point if isinstance(entry_point, str) else ""
        extra = next((name for name in EXTRAS if place.startswith(f"gymnasium.envs.{name}")), None)
        cure = f"pip install 'grpo-fed[{extra}]'" if extra else "install what is missing"
        return MissingPackageError(f"{where}: needs a package that is not installed: {cure} ({error})")
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
