"""MountainCar: a car in a valley that has to swing back to climb out; with discrete and with continuous throttle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.continuous_mountain_car import Continuous_MountainCarEnv
from gymnasium.envs.classic_control.mountain_car import MountainCarEnv

from grpo_fed.tasks.families.base import (
    Array,
    Constants,
    Family,
    Flags,
    Floats,
    Painter,
    Parameter,
    gymnasium_painter,
    sample_uniform,
)

LEFT, RIGHT, MAX_SPEED = -1.2, 0.6, 0.07
GRAVITY = Parameter(0.0025, "gravity, position/step^2", 0, 0.1)


@final
@dataclass(frozen=True)
class MountainCar(Family):
    """State: position, velocity. Actions: 0 left, 1 coast, 2 right. The reward is -1 a step until the flag on the hill.

    Moore (1990), PhD thesis; the form of Sutton and Barto (2018), example 10.1.
    """

    parameters: ClassVar = {
        "force": Parameter(0.001, "force of the engine, position/step^2", 0, 0.1),
        "gravity": GRAVITY,
    }
    episode_limit = 200
    reward_threshold = -110.0
    state_size = 2

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        return _space()

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(3)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        return parameters

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        return _valley_starts(generators)

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        state = _step_through_valley(state, (actions - 1) * constants["force"], constants["gravity"])
        return state, np.full(len(state), -1.0), (state[:, 0] >= 0.5) & (state[:, 1] >= 0)

    def observe(self, state: Floats, constants: Constants) -> Array:
        return state.astype(np.float32)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        return gymnasium_painter(MountainCarEnv(render_mode="rgb_array"))


@final
@dataclass(frozen=True)
class MountainCarContinuous(Family):
    """The same valley with a throttle from -1 to 1 and a lower flag: 100 for the flag, less 0.1 throttle^2 a step."""

    parameters: ClassVar = {
        "power": Parameter(0.0015, "power of the engine, position/step^2", 0, 0.1),
        "gravity": GRAVITY,
    }
    episode_limit = 999
    reward_threshold = 90.0
    state_size = 2

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        return _space()

    @property
    def action_space(self) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        return parameters

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        return _valley_starts(generators)

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        throttle = actions[:, 0].astype(np.float64)
        push = np.minimum(np.maximum(throttle, -1.0), 1.0) * constants["power"]
        state = _step_through_valley(state, push, constants["gravity"])
        arrived = (state[:, 0] >= 0.45) & (state[:, 1] >= 0)
        return state, 100.0 * arrived - throttle * throttle * 0.1, arrived

    def observe(self, state: Floats, constants: Constants) -> Array:
        return state.astype(np.float32)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        return gymnasium_painter(Continuous_MountainCarEnv(render_mode="rgb_array"))


def _space() -> gymnasium.spaces.Box:
    low, high = np.array([[LEFT, -MAX_SPEED], [RIGHT, MAX_SPEED]], dtype=np.float32)
    return gymnasium.spaces.Box(low, high, dtype=np.float32)


def _valley_starts(generators: Sequence[np.random.Generator]) -> Floats:
    """Sample first states [n, 2]: somewhere near the bottom, at rest."""
    positions = sample_uniform(generators, 1, -0.6, -0.4)
    return np.concatenate((positions, np.zeros_like(positions)), axis=1)


def _step_through_valley(state: Floats, push: Floats, gravity: Array) -> Floats:
    """Step states [L, 2] through the valley sin(3 x), whose left wall stops the car."""
    position, velocity = state.T
    velocity = velocity + (push - gravity * np.cos(3 * position))
    velocity = np.minimum(np.maximum(velocity, -MAX_SPEED), MAX_SPEED)
    position = np.minimum(np.maximum(position + velocity, LEFT), RIGHT)
    stopped = (position == LEFT) & (velocity < 0)
    return np.array((position, np.where(stopped, 0.0, velocity))).T
