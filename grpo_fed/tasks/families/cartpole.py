"""CartPole: balance a pole on a cart by pushing the cart left or right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import ClassVar, final

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

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

TAU = 0.02  # seconds per step
TRACK, TILT = 2.4, 12 * 2 * pi / 360  # an episode ends when the cart or the pole goes further
LIMITS = np.array([TRACK, TILT])


@final
@dataclass(frozen=True)
class CartPole(Family):
    """State: position, velocity, angle, angular velocity. Actions: 0 pushes left, 1 right. The reward is 1 a step.

    Barto, Sutton and Anderson (1983), with the equations of Florian (2007), "Correct equations for the dynamics of the
    cart-pole system", (23) and (24), without friction, stepped by the explicit Euler method. The operations are in
    gymnasium's order, so the numbers equal gymnasium's to the last bit.
    """

    hide_velocities: bool = False
    """Show position and angle alone, so that a policy has to remember them to know how fast they change."""

    parameters: ClassVar = {
        "length": Parameter(0.5, "half the pole's length, m", 0.01, 100),
        "masscart": Parameter(1.0, "mass of the cart, kg", 0.01, 100),
        "masspole": Parameter(0.1, "mass of the pole, kg", 0.001, 100),
        "gravity": Parameter(9.8, "gravity, m/s^2", 0, 1000),
        "force_mag": Parameter(10.0, "force of a push, N", 0, 1000),
    }
    episode_limit = 500
    reward_threshold = 475.0
    state_size = 4

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        high = np.array([2 * TRACK, np.inf, 2 * TILT, np.inf], dtype=np.float32)
        high = high[::2] if self.hide_velocities else high
        return gymnasium.spaces.Box(-high, high, dtype=np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(2)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        pole, length = parameters["masspole"], parameters["length"]
        return {
            **parameters,
            "total": pole + parameters["masscart"],
            "moment": pole * length,
            "left": -parameters["force_mag"],
        }

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        return sample_uniform(generators, 4, -0.05, 0.05)

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        _, velocity, angle, spin = state.T
        total, moment = constants["total"], constants["moment"]
        sin, cos = np.sin(angle), np.cos(angle)
        push = (np.where(actions, constants["force_mag"], constants["left"]) + moment * np.square(spin) * sin) / total
        inertia = constants["length"] * (4.0 / 3.0 - constants["masspole"] * np.square(cos) / total)
        angular = (constants["gravity"] * sin - cos * push) / inertia
        linear = push - moment * angular * cos / total
        state = state + TAU * np.array((velocity, linear, spin, angular)).T
        beyond = np.abs(state[:, ::2]) > LIMITS
        return state, np.ones(len(state)), beyond[:, 0] | beyond[:, 1]

    def observe(self, state: Floats, constants: Constants) -> Array:
        return (state[:, ::2] if self.hide_velocities else state).astype(np.float32)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        original = CartPoleEnv(render_mode="rgb_array")
        original.length = float(parameters["length"])
        return gymnasium_painter(original)
