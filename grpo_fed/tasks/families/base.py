"""What a family of tasks is: pure dynamics that step many lanes with unlike parameters in one call.

S numbers make up a state, O an observation, A an action; L lanes are stepped together. A lane is one copy of one task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces.utils import flatdim

from grpo_fed.scenario.toml.text import suggest_name

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Constants = Mapping[str, Array]
Picture = npt.NDArray[np.uint8]
Painter = Callable[[Floats], Picture]


@dataclass(frozen=True)
class Parameter:
    """A number (or a few) in which the tasks of a family differ."""

    default: float | tuple[float, ...]
    doc: str
    low: float
    """The least value allowed."""
    high: float
    """The greatest value allowed."""
    shape: tuple[int, ...] = ()
    """() for one number, (n,) for n of them."""


class Family(ABC):
    """Tasks with the same dynamics and unlike parameters: arrays in, arrays out, no state and no draws of its own.

    A subclass is a frozen dataclass; its fields, if any, are what all lanes must share because it decides shapes.
    """

    parameters: ClassVar[Mapping[str, Parameter]]
    """What may differ from lane to lane."""
    episode_limit: ClassVar[int]
    """Steps after which an episode is truncated, unless somebody asks for another limit."""
    reward_threshold: ClassVar[float | None]
    """The mean return from which the task counts as solved."""
    state_size: ClassVar[int]
    """S."""
    noise_size: ClassVar[int] = 0
    """Uniform numbers that one step of one lane uses up."""

    @property
    @abstractmethod
    def observation_space(self) -> gymnasium.Space[Any]:
        """Of one lane: a flat Box or a Discrete."""

    @property
    @abstractmethod
    def action_space(self) -> gymnasium.Space[Any]:
        """Of one lane: a flat Box or a Discrete."""

    @abstractmethod
    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        """What `step` and `observe` need, worked out once from the parameters [L, ...] of all lanes."""

    @abstractmethod
    def start(self, generator: np.random.Generator) -> Array:
        """The first state [S] of one episode."""

    @abstractmethod
    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        """States [L, S], actions [L] or [L, A], noise [L, noise_size] -> next states, rewards [L], terminated [L]."""

    @abstractmethod
    def observe(self, state: Floats, constants: Constants) -> Array:
        """States [L, S] -> observations: [L, O] float32, or [L] int64 for a Discrete space."""

    @abstractmethod
    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        """What draws one lane: its parameters (without the lane axis) -> (state [S] -> picture [H, W, 3])."""


def paint_with(original: gymnasium.Env[Any, Any]) -> Painter:
    """Draw by handing the state to the environment of gymnasium's that has the same one."""

    def paint(state: Floats) -> Picture:
        original.state = state  # type: ignore[attr-defined]
        return np.asarray(original.render(), dtype=np.uint8)

    return paint


def parameters_of(family: Family) -> dict[str, Parameter]:
    """The family's own parameters and those that every family has."""
    entries = flatdim(family.observation_space)
    return {
        **family.parameters,
        "swap_actions": Parameter(False, "actions are mirrored about the middle of their space", 0, 1),
        "permute": Parameter(
            tuple(range(entries)), "entry i of the observation is entry permute[i]", 0, entries - 1, (entries,)
        ),
        "sensor_noise": Parameter(0.0, "standard deviation of the noise on every observation entry", 0, 1e3),
    }


def read_parameters(family: Family, given: Mapping[str, Any], lanes: int) -> dict[str, Floats]:
    """Every parameter for every lane, [L, ...], from one value or a list of L; None stands for the default."""
    where, known = type(family).__name__, parameters_of(family)
    for name in given:
        if name not in known:
            names = [*known, *(field.name for field in fields(family))]  # type: ignore[arg-type]
            raise ValueError(f"{where}: {name}: unknown parameter{suggest_name(name, names)}")
    values = {name: _read(f"{where}: {name}", known[name], given.get(name), lanes) for name in known}
    for row in values["permute"]:
        if sorted(row) != list(range(len(row))):
            raise ValueError(f"{where}: permute: {row.astype(int).tolist()} must hold each of 0 to {len(row) - 1} once")
    if values["sensor_noise"].any() and not isinstance(family.observation_space, gymnasium.spaces.Box):
        raise ValueError(f"{where}: sensor_noise: a {family.observation_space} observation has no noise; leave it at 0")
    return values


def _read(where: str, parameter: Parameter, value: Any, lanes: int) -> Floats:
    if value is None:
        value = parameter.default
    elif isinstance(value, list | tuple):
        value = [parameter.default if entry is None else entry for entry in value]
    shape, many = parameter.shape, (lanes, *parameter.shape)
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full((), np.nan)
    allowed = f"{parameter.low:g} to {parameter.high:g} ({parameter.doc}; default {parameter.default})"
    if array.shape not in (shape, many):
        one = f"{shape[0]} numbers" if shape else "a number"
        raise ValueError(f"{where}: {value!r}: give {one}, or a list of one for each of {lanes} lanes, from {allowed}")
    if not np.all((array >= parameter.low) & (array <= parameter.high)):
        raise ValueError(f"{where}: {value!r} is outside its limits; give a value from {allowed}")
    return np.broadcast_to(array, many).copy()
