"""PointMass: push a point through a square arena to its goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import gymnasium
import numpy as np

from grpo_fed.tasks.families.base import (
    Array,
    Constants,
    CostlyFamily,
    Flags,
    Floats,
    Painter,
    Parameter,
    Picture,
    sample_uniform,
)

DT = 0.1  # seconds per step
WALL, MAX_SPEED = 1.0, 1.0
PIXELS = 256


@final
@dataclass(frozen=True)
class PointMass(CostlyFamily):
    """State: x, y and their velocities. Action: a force in both directions. The reward is minus the distance to the
    goal, within `radius` of which the episode ends.

    2-D navigation as in Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning", section 5.3, with a mass: each
    client has a goal of its own, which it has to discover unless `observe_goal` shows it. A step that leads into the
    hazard, a disc of radius `hazard_radius`, costs 1; nothing stops the point there, and it does not see it.
    """

    observe_goal: bool = False
    """Add the goal to the observation."""

    parameters: ClassVar = {
        "goal": Parameter((0.5, 0.5), "position of the goal", -WALL, WALL, (2,)),
        "radius": Parameter(0.1, "distance from the goal at which an episode ends, m", 0.01, 1),
        "power": Parameter(1.0, "acceleration of a full push, m/s^2", 0, 10),
        "drag": Parameter(0.1, "share of the velocity lost per second", 0, 10),
        "hazard": Parameter((0.25, 0.25), "centre of the hazard", -WALL, WALL, (2,)),
        "hazard_radius": Parameter(0.0, "radius of the hazard, m; 0 for none", 0, 1),
    }
    episode_limit = 100
    reward_threshold = None
    state_size = 4

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-1.0, 1.0, shape=(6 if self.observe_goal else 4,), dtype=np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        return {**parameters, "power": parameters["power"][:, None], "drag": parameters["drag"][:, None]}

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        positions = sample_uniform(generators, 2, -0.1, 0.1)
        return np.concatenate((positions, np.zeros_like(positions)), axis=1)

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        position, velocity = state[:, :2], state[:, 2:]
        force = np.minimum(np.maximum(actions, -1.0), 1.0) * constants["power"]
        velocity = velocity + DT * (force - constants["drag"] * velocity)
        velocity = np.minimum(np.maximum(velocity, -MAX_SPEED), MAX_SPEED)
        unbounded = position + DT * velocity
        position = np.minimum(np.maximum(unbounded, -WALL), WALL)
        velocity = np.where(unbounded == position, velocity, 0.0)  # a wall stops the point
        offset = position - constants["goal"]
        distance = np.hypot(offset[:, 0], offset[:, 1])
        return np.concatenate((position, velocity), axis=1), -distance, distance <= constants["radius"]

    def observe(self, state: Floats, constants: Constants) -> Array:
        seen = np.concatenate((state, constants["goal"]), axis=1) if self.observe_goal else state
        return seen.astype(np.float32)

    def costs(self, state: Floats, constants: Constants) -> Floats:
        radius = constants["hazard_radius"]
        if not radius.any():
            return np.zeros(len(state))
        offset = state[:, :2] - constants["hazard"]
        return (np.hypot(offset[:, 0], offset[:, 1]) < radius).astype(np.float64)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        x = np.linspace(-1.1, 1.1, PIXELS)
        grid = np.stack((np.broadcast_to(x, (PIXELS, PIXELS)), np.broadcast_to(-x[:, None], (PIXELS, PIXELS))), axis=2)

        def paint(state: Floats) -> Picture:
            picture = np.full((PIXELS, PIXELS, 3), 255, dtype=np.uint8)
            picture[np.abs(grid).max(axis=2) > WALL] = 90
            hazard = np.hypot(*np.moveaxis(grid - parameters["hazard"], 2, 0)) < parameters["hazard_radius"]
            picture[hazard] = (240, 190, 180)
            picture[np.hypot(*np.moveaxis(grid - parameters["goal"], 2, 0)) <= parameters["radius"]] = (90, 190, 90)
            picture[np.hypot(*np.moveaxis(grid - state[:2], 2, 0)) <= 0.04] = (40, 80, 200)
            return picture

        return paint
