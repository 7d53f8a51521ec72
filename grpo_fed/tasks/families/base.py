"""Family, the interface to parametric tasks: pure dynamics that step many env copies in one vectorised call.

Tasks of a family have the same dynamics and differ in the values of their parameters (masses, goals, ...), and so may
the L env copies that are stepped together. S is the size of a state, O that of an observation, A that of an action.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces.utils import flatdim

from grpo_fed.scenario.toml.text import suggest_name
from grpo_fed.tasks.pictures import picture_shape

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Constants = Mapping[str, Array]
Picture = npt.NDArray[np.uint8]
Painter = Callable[[Floats], Picture]


@dataclass(frozen=True)
class Parameter:
    """A number, or a few numbers, in which the tasks of a family differ."""

    default: float | tuple[float, ...]
    doc: str
    low: float
    """The smallest value allowed."""
    high: float
    """The largest value allowed."""
    shape: tuple[int, ...] = ()
    """() for one number, (n,) for n of them."""


class Family(ABC):
    """The dynamics of a family of tasks: functions from arrays to arrays, without state or random numbers of its own.

    A subclass is a frozen dataclass. Its fields, if any, determine shapes, so all env copies must have them in common.
    """

    parameters: ClassVar[Mapping[str, Parameter]]
    """Parameters that may differ between env copies."""
    episode_limit: ClassVar[int]
    """Steps after which an episode is truncated, unless the user sets another limit."""
    reward_threshold: ClassVar[float | None]
    """The mean return from which the task counts as solved."""
    state_size: ClassVar[int]
    """S."""
    noise_size: ClassVar[int] = 0
    """Number of uniform random numbers that a step of one env copy uses."""

    @property
    @abstractmethod
    def observation_space(self) -> gymnasium.Space[Any]:
        """The observation space of one env copy: a flat Box, a Discrete, or pictures."""

    @property
    @abstractmethod
    def action_space(self) -> gymnasium.Space[Any]:
        """The action space of one env copy: a flat Box or a Discrete."""

    @abstractmethod
    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        """Compute once, from the parameters [L, ...] of all env copies, the constants that `step` and `observe` use."""

    @abstractmethod
    def start(self, generators: Sequence[np.random.Generator]) -> Array:
        """Sample the first states [n, S] of n episodes, each from its own generator."""

    @abstractmethod
    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        """Compute the next states [L, S], rewards [L] and terminated [L] of a step.

        state: [L, S]. actions: [L] for a Discrete space, [L, A] for a Box. noise: [L, noise_size], uniform from 0 to 1.
        """

    @abstractmethod
    def observe(self, state: Floats, constants: Constants) -> Array:
        """Compute the observations of states [L, S]: [L, O] float32, or pictures [L, C, H, W] uint8.

        For a Discrete space, [L] int64.
        """

    @abstractmethod
    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        """Make the function that draws a state [S] of one env copy as a picture [H, W, 3], from its parameters."""


class CostlyFamily(Family):
    """A family whose steps cost something beside what they are rewarded for; infos have it as `cost`."""

    @abstractmethod
    def costs(self, state: Floats, constants: Constants) -> Floats:
        """Compute the costs [L] of steps that led to states [L, S]."""


def sample_uniform(
    generators: Sequence[np.random.Generator], size: int, low: float | Floats, high: float | Floats
) -> Floats:
    """Sample `size` numbers from each generator, uniform between low and high, [n, size].

    They equal `generator.uniform(low, high, size)`, which takes three times as long.
    """
    rows = np.empty((len(generators), size))
    for generator, row in zip(generators, rows, strict=True):
        generator.random(out=row)
    return low + (high - low) * rows


def gymnasium_painter(original: gymnasium.Env[Any, Any]) -> Painter:
    """Make a painter that renders the state with gymnasium's environment, whose state has the same form."""

    def paint(state: Floats) -> Picture:
        original.state = state  # type: ignore[attr-defined]
        return np.asarray(original.render(), dtype=np.uint8)

    return paint


def all_parameters(family: Family) -> dict[str, Parameter]:
    """Return the family's own parameters and those that every family has, the last two unless it shows pictures."""
    own = {
        **family.parameters,
        "swap_actions": Parameter(False, "whether actions are mirrored about the middle of their space", 0, 1),
    }
    if picture_shape(family.observation_space):
        return own
    entries = flatdim(family.observation_space)
    return {
        **own,
        "permute": Parameter(
            tuple(range(entries)), "entry i of the observation is entry permute[i]", 0, entries - 1, (entries,)
        ),
        "sensor_noise": Parameter(0.0, "standard deviation of the noise on every observation entry", 0, 1e3),
    }


def read_parameters(family: Family, given: Mapping[str, Any], num_envs: int) -> dict[str, Floats]:
    """Check parameters, and return every parameter of the family for every env copy, [L, ...] each.

    given: by name one value for all env copies, or a list of one for each; None stands for the default.

    ValueError for a name that the family does not have, or a value outside the parameter's limits.
    """
    where, parameters = type(family).__name__, all_parameters(family)
    for name in given:
        if name not in parameters:
            names = [*parameters, *(field.name for field in fields(family))]  # type: ignore[arg-type]
            raise ValueError(f"{where}: {name}: unknown parameter{suggest_name(name, names)}")
    values = {
        name: _read_values(f"{where}: {name}", parameter, given.get(name), num_envs)
        for name, parameter in parameters.items()
    }
    for row in values.get("permute", ()):
        if sorted(row) != list(range(len(row))):
            raise ValueError(f"{where}: permute: {row.astype(int).tolist()} must hold each of 0 to {len(row) - 1} once")
    has_noise = "sensor_noise" in values and values["sensor_noise"].any()
    if has_noise and not isinstance(family.observation_space, gymnasium.spaces.Box):
        raise ValueError(f"{where}: sensor_noise: a {family.observation_space} observation has no noise; leave it at 0")
    return values


def _read_values(where: str, parameter: Parameter, value: Any, num_envs: int) -> Floats:
    """Check a parameter's value or list of values, and return it for every env copy, [L, ...]."""
    if value is None:
        value = parameter.default
    elif isinstance(value, list | tuple):
        value = [parameter.default if entry is None else entry for entry in value]
    shape, full_shape = parameter.shape, (num_envs, *parameter.shape)
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full((), np.nan)
    allowed = f"from {parameter.low:g} to {parameter.high:g} ({parameter.doc}; default {parameter.default})"
    if array.shape not in (shape, full_shape):
        form = f"{shape[0]} numbers" if shape else "a number"
        raise ValueError(
            f"{where}: {value!r}: give {form}, or a list with {form} for each of {num_envs} env copies, {allowed}"
        )
    if not np.all((array >= parameter.low) & (array <= parameter.high)):
        raise ValueError(f"{where}: {value!r} is outside its limits; give a value {allowed}")
    return np.broadcast_to(array, full_shape).copy()
