"""Pendulum: swing a pendulum up and hold it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import ClassVar, final

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv

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

DT = 0.05  # seconds per step
MAX_SPEED, MAX_TORQUE = 8.0, 2.0
START: Floats = np.array([pi, 1.0])


@final
@dataclass(frozen=True)
class Pendulum(Family):
    """State: angle from upright, angular velocity. Action: torque at the pivot. Episodes never terminate.

    The reward is the negative of angle^2 + 0.1 speed^2 + 0.001 torque^2.

    A rod of mass m and length l about its end has the moment of inertia m l^2 / 3, so the angle accelerates by
    3 g / (2 l) sin(angle) + 3 / (m l^2) (torque - damping * speed). The speed is stepped first, then the angle with
    the new speed.
    """

    parameters: ClassVar = {
        "gravity": Parameter(10.0, "gravity, m/s^2", 0, 1000),
        "mass": Parameter(1.0, "mass of the rod, kg", 0.01, 100),
        "length": Parameter(1.0, "length of the rod, m", 0.05, 100),
        "damping": Parameter(0.0, "friction at the pivot, N m s", 0, 10),
    }
    episode_limit = 200
    reward_threshold = None
    state_size = 2

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        high = np.array([1.0, 1.0, MAX_SPEED], dtype=np.float32)
        return gymnasium.spaces.Box(-high, high, dtype=np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-MAX_TORQUE, MAX_TORQUE, shape=(1,), dtype=np.float32)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        gravity, length = parameters["gravity"], parameters["length"]
        lightness = 3.0 / (parameters["mass"] * length**2)
        # gymnasium multiplies the torque in the action's float32; so must we, to equal it bit for bit.
        push = lightness.astype(np.float32)
        return {"swing": 3 * gravity / (2 * length), "push": push, "drag": lightness * parameters["damping"]}

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        return sample_uniform(generators, 2, -START, START)

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        angle, speed = state.T
        torque = np.minimum(np.maximum(actions[:, 0], -MAX_TORQUE), MAX_TORQUE)
        upright = (angle + pi) % (2 * pi) - pi
        cost = upright * upright + 0.1 * (speed * speed) + 0.001 * (torque * torque)
        pull = constants["swing"] * np.sin(angle) + constants["push"] * torque - constants["drag"] * speed
        speed = np.minimum(np.maximum(speed + pull * DT, -MAX_SPEED), MAX_SPEED)
        return np.array((angle + speed * DT, speed)).T, -cost, np.zeros(len(state), dtype=np.bool_)

    def observe(self, state: Floats, constants: Constants) -> Array:
        angle, speed = state.T
        return np.array((np.cos(angle), np.sin(angle), speed)).T.astype(np.float32)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        original = PendulumEnv(render_mode="rgb_array")
        original.last_u = None
        return gymnasium_painter(original)
