"""Acrobot: a chain of two links whose end has to swing above a line, with a motor at the joint between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from typing import ClassVar, final

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.acrobot import AcrobotEnv

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

DT = 0.2  # seconds per step
MAX_SPEEDS = np.array([[4 * pi], [9 * pi]])
INERTIA = 1.0  # of each link, kg m^2, whatever its mass and length


@final
@dataclass(frozen=True)
class Acrobot(Family):
    """State: the first link's angle from hanging, the second link's angle from the first, and their velocities.

    Actions: torque -1, 0 or +1 N m at the joint. The reward is -1 for each step but the one that brings the end above
    the line, which ends the episode.
    Sutton and Barto (1998), section 11.3: d1 a1 + d2 a2 + phi1 = 0, where d2 a1 + E a2 + phi2 + the centrifugal pull of
    the first link (left out in the paper, Sutton 1996) = torque; stepped by the fourth-order Runge-Kutta method.
    """

    parameters: ClassVar = {
        "length_1": Parameter(1.0, "length of the first link, m", 0.05, 100),
        "length_2": Parameter(1.0, "length of the second link, m", 0.05, 100),
        "mass_1": Parameter(1.0, "mass of the first link, kg", 0.01, 100),
        "mass_2": Parameter(1.0, "mass of the second link, kg", 0.01, 100),
        "gravity": Parameter(9.8, "gravity, m/s^2", 0, 1000),
        "nips": Parameter(False, "whether to use the equations of the paper (NIPS 1996) instead of the book's", 0, 1),
    }
    episode_limit = 500
    reward_threshold = -100.0
    state_size = 4

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        high = np.array([1.0, 1.0, 1.0, 1.0, 4 * pi, 9 * pi], dtype=np.float32)
        return gymnasium.spaces.Box(-high, high, dtype=np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(3)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        first, second, gravity = parameters["mass_1"], parameters["mass_2"], parameters["gravity"]
        length, centre_1, centre_2 = parameters["length_1"], parameters["length_1"] / 2, parameters["length_2"] / 2
        coupling = second * length * centre_2
        return {
            "D": first * centre_1**2 + second * (length**2 + centre_2**2) + 2 * INERTIA,
            "E": second * centre_2**2 + INERTIA,
            "coupling": coupling,
            "centrifugal": np.where(parameters["nips"], 0.0, coupling),
            "weight_1": (first * centre_1 + second * length) * gravity,
            "weight_2": second * centre_2 * gravity,
        }

    def start(self, generators: Sequence[np.random.Generator]) -> Array:
        return sample_uniform(generators, 4, -0.1, 0.1).astype(np.float32)

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        before, torque = state.T, actions - 1.0
        k1 = _rates(before, torque, constants)
        k2 = _rates(before + DT / 2 * k1, torque, constants)
        k3 = _rates(before + DT / 2 * k2, torque, constants)
        k4 = _rates(before + DT * k3, torque, constants)
        after = before + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = after[:2]
        angles -= 2 * pi * np.floor((angles + pi) / (2 * pi))
        after[2:] = np.minimum(np.maximum(after[2:], -MAX_SPEEDS), MAX_SPEEDS)
        above = -np.cos(angles[0]) - np.cos(angles[1] + angles[0]) > 1.0
        return after.T, above - 1.0, above

    def observe(self, state: Floats, constants: Constants) -> Array:
        angles = state.T[:2]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.array((cos[0], sin[0], cos[1], sin[1], state[:, 2], state[:, 3])).T.astype(np.float32)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        original = AcrobotEnv(render_mode="rgb_array")
        original.LINK_LENGTH_1, original.LINK_LENGTH_2 = float(parameters["length_1"]), float(parameters["length_2"])
        return gymnasium_painter(original)


def _rates(state: Floats, torque: Floats, constants: Constants) -> Floats:
    """Compute the time derivatives [4, L] of states [4, L]."""
    angle_1, angle_2, speed_1, speed_2 = state
    sin = np.sin(angle_2)
    pull = constants["coupling"] * np.cos(angle_2)
    d2 = constants["E"] + pull
    d1 = constants["D"] + pull + pull
    phi_2 = constants["weight_2"] * np.sin(angle_1 + angle_2)
    coriolis = constants["coupling"] * sin * speed_2 * (speed_2 + speed_1 + speed_1)
    phi_1 = constants["weight_1"] * np.sin(angle_1) + phi_2 - coriolis
    ratio = d2 / d1
    drive = torque + ratio * phi_1 - constants["centrifugal"] * sin * (speed_1 * speed_1) - phi_2
    second = drive / (constants["E"] - d2 * ratio)
    return np.array((speed_1, speed_2, -(d2 * second + phi_1) / d1, second))
