"""Finds, makes and wraps gymnasium environments, and explains what is wrong where that fails."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator, parse_env_id
from gymnasium.error import DependencyNotInstalled

import grpo_fed.tasks.families  # noqa: F401, importing it registers `grpo_fed/CartPole-v1` and its like
from grpo_fed.scenario.extras import write_install_command
from grpo_fed.scenario.importing import describe_exception, import_object
from grpo_fed.tasks.gym_task import Env, EnvConfig, EnvWrapper, VectorEnv
from grpo_fed.tasks.task import NO_STEP_LIMIT, MissingPackageError

EXTRAS = ("box2d", "mujoco", "metaworld")
"""Extras with packages of environments."""


# Making environments -------------------------------------------------------------------------------------------------


def make_env(config: EnvConfig, render_mode: str | None = None, lean: bool = False) -> Env:
    """Make one copy of a client's environment, with its wrappers.

    lean: leave out gymnasium's own wrappers, and with them the step limit of the episodes. An environment that has
    wrappers of the scenario or of its registration keeps them all, since its wrappers may rely on gymnasium's.

    ValueError with the cause and a cure if the environment or a wrapper cannot be made.
    """
    spec = copy.copy(find_env_spec(config))
    limit = config.episode_limit
    kwargs = dict(config.kwargs) if render_mode is None else {**config.kwargs, "render_mode": render_mode}
    if lean and not is_wrapped(config):
        spec.order_enforce = False
        limit = 0
    try:
        env: Env = gymnasium.make(spec, max_episode_steps=limit or -1, disable_env_checker=True, **kwargs)
    except Exception as error:
        raise _explain_failure(config, kwargs, spec.entry_point, error) from error
    for wrapper in config.wrappers:
        env = _wrap(config.client, wrapper, env)
    return env


def gives_pictures(env: str) -> bool | None:
    """Return whether an environment says that it gives pictures; None if it does not say, or cannot be found here.

    env: an id, as in a scenario. The environment is not made.
    """
    try:
        spec = find_registered_spec("", env)
        entry_point = spec.entry_point
        creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    except Exception:  # noqa: BLE001, the module of a user's environment may raise anything
        return None
    modes = getattr(creator, "metadata", {}).get("render_modes")
    return None if modes is None else "rgb_array" in modes


def make_vector_env(config: EnvConfig, num_envs: int, limit: int | None) -> VectorEnv:
    """Make `num_envs` copies of a client's environment as the vector environment that its id is registered with.

    limit: steps after which the vector environment truncates episodes, 0 for never; with None it is not given a limit.

    ValueError with the cause and a cure if it cannot be made.
    """
    spec, where = find_env_spec(config), f"client {config.client}: {config.env}"
    if config.wrappers:
        raise ValueError(
            f"{where}: wrappers = {list(map(str, config.wrappers))}: it is registered as a vector environment only, and"
            " wrappers need a single environment; leave wrappers out, or register an entry_point for it"
        )
    kwargs = dict(config.kwargs)
    if limit is not None and limit != (spec.max_episode_steps or 0):
        kwargs["max_episode_steps"] = limit or NO_STEP_LIMIT
    try:
        env: VectorEnv = gymnasium.make_vec(spec, num_envs, **kwargs)
    except Exception as error:
        raise _explain_failure(config, kwargs, spec.vector_entry_point, error) from error
    if env.num_envs != num_envs:
        raise ValueError(f"{where}: asked for {num_envs} copies, it made {env.num_envs}")
    return env


def _wrap(client: str, given: EnvWrapper, env: Env) -> Env:
    """Put a wrapper around an environment."""
    where = f"client {client}: wrappers: {given.path}"
    try:
        wrapper = import_object(given.path)
    except ValueError as error:
        raise _error_type(error.__cause__)(f"{where}: {error}") from error
    try:
        wrapped: Env = wrapper(env, **given.kwargs)
    except Exception as error:
        with_kwargs = f" with kwargs = {dict(given.kwargs)}" if given.kwargs else ""
        raise _error_type(error)(f"{where}{with_kwargs}: {describe_exception(error)}") from error
    if not isinstance(wrapped, gymnasium.Env):
        raise ValueError(f"{where}: makes {type(wrapped).__name__}, which is no gymnasium.Env")
    return wrapped


# Finding them in gymnasium's registry --------------------------------------------------------------------------------


def find_env_spec(config: EnvConfig) -> EnvSpec:
    """Find the specification that gymnasium has of a client's environment; ValueError with a cure if it has none."""
    return find_registered_spec(config.client, config.env)


def is_wrapped(config: EnvConfig) -> bool:
    """Return whether an environment has wrappers, those of the scenario or those of its registration."""
    return bool(config.wrappers or find_env_spec(config).additional_wrappers)


def find_registered_spec(client: str, env: str) -> EnvSpec:
    """Find the specification that gymnasium has of an environment id.

    env: `module:EnvId` imports the module first. An id without -vN stands for its latest version. For
    `module:function`, or a class, where no such id is registered, a specification is made that calls it.

    ValueError with a cure if the module cannot be imported or no such id is registered.
    """
    where = f"client {client}: env = {env!r}"
    module, colon, name = env.partition(":")
    if not colon:
        name = env
    elif module not in sys.modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == module
            cure = f": {write_install_command(module)}" if absent and module in EXTRAS else ""
            text = f"{module} cannot be imported: {describe_exception(error)}{cure}"
            raise _error_type(error)(f"{where}: {text}") from error
    spec = gymnasium.registry.get(name)
    if spec is None and colon and callable(function := getattr(sys.modules[module], name, None)):
        return _spec_of_function(env, name, function)
    if spec is None:
        try:
            namespace, base_name, version = parse_env_id(name)
        except gymnasium.error.Error:
            raise ValueError(f"{where}: {name!r} is no gymnasium id; they look like CartPole-v1") from None
        registered = gymnasium.registry.values()
        versions = [spec for spec in registered if (spec.namespace, spec.name) == (namespace, base_name)]
        if version is not None or not versions:
            # the package that registers a namespace may be missing here alone; a wrong name is wrong everywhere
            missing = namespace is not None and all(spec.namespace != namespace for spec in registered)
            error_type = MissingPackageError if missing else ValueError
            raise error_type(f"{where}: no such task is registered{_similar_ids(name)}")
        spec = max(versions, key=lambda spec: spec.version or 0)
    return spec


@cache
def _spec_of_function(env: str, name: str, function: Callable[..., Env]) -> EnvSpec:
    """Make the specification of environments that a function makes, `module:function`; it is registered nowhere."""
    return EnvSpec(id=name, entry_point=function)


def _similar_ids(name: str) -> str:
    """Return the cure for an id that is not registered: similar ids, or to import the package that registers it."""
    by_lower = {registered.lower(): registered for registered in gymnasium.registry}
    similar = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    if similar:
        return f"; did you mean {' or '.join(similar)}?"
    return f"; if a package of yours registers it, put the package before it: my_package:{name}"


# Explaining failures -------------------------------------------------------------------------------------------------


def _error_type(cause: BaseException | None) -> type[ValueError]:
    """Choose the type of the error to raise because of `cause`."""
    return MissingPackageError if isinstance(cause, DependencyNotInstalled | ModuleNotFoundError) else ValueError


def _explain_failure(config: EnvConfig, kwargs: Mapping[str, Any], entry_point: object, error: Exception) -> ValueError:
    """Return the error that says why an environment could not be made, and what to do."""
    where = f"client {config.client}: {config.env}"
    if isinstance(error, DependencyNotInstalled | ModuleNotFoundError):
        module = entry_point if isinstance(entry_point, str) else ""
        extra = next((name for name in EXTRAS if module.startswith(f"gymnasium.envs.{name}")), None)
        cure = write_install_command(extra) if extra else "install what is missing"
        return MissingPackageError(f"{where}: needs a package that is not installed: {cure} ({error})")
    inner = error.__cause__ if isinstance(error.__cause__, TypeError) else error  # gymnasium wraps a TypeError in one
    text = f"{type(inner).__name__}: {inner}{_suggest_arguments(kwargs, entry_point)}"
    return ValueError(f"{where}: cannot be made with kwargs = {kwargs}: {text}")


def _suggest_arguments(kwargs: Mapping[str, Any], entry_point: object) -> str:
    """Return the cure for arguments that the environment does not take."""
    try:
        creator: Any = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
        parameters = inspect.signature(creator).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return ""
    accepted = [parameter.name for parameter in parameters if parameter.name not in ("num_envs", "render_mode")]
    unknown = [name for name in kwargs if name not in accepted]
    if not unknown or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return ""
    similar = difflib.get_close_matches(unknown[0], accepted, n=1)
    return f"; {unknown[0]}: did you mean {similar[0]}?" if similar else f"; it takes {', '.join(accepted) or 'none'}"
