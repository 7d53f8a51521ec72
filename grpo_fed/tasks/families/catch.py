"""Catch: catch balls that fall, seen as pictures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import gymnasium
import numpy as np

from grpo_fed.tasks.families.base import Array, Constants, Family, Flags, Floats, Painter, Parameter, Picture

PIXELS = 42
"""Rows and columns of a frame."""
FRAMES = 2
"""The frame before, and the present one: the drift of a ball is seen in no single frame."""
RADIUS = 1.5
"""Half the side of a ball, in pixels."""
FLOOR = PIXELS - 3.0
"""The row of the paddle's top, at which a ball is caught or lost."""
BALLS = 5
SCALE = 6
"""Pixels of a drawing for each pixel of a frame."""
X, Y, DRIFT, PADDLE, LEFT, X_BEFORE, Y_BEFORE, PADDLE_BEFORE = range(8)
"""The columns of a state; positions are in pixels, of the middle of a ball or of the paddle."""


@final
@dataclass(frozen=True)
class Catch(Family):
    """Observation: two frames of 42 x 42 pixels, a ball that falls and bounces off the walls, and a paddle below.

    Actions: 0 moves the paddle left, 1 lets it stay, 2 moves it right. The reward is 1 for a ball that is caught and -1
    for one that is lost, and 0 for all other steps. An episode has five balls. A larger form of the Catch of bsuite
    (1908.03568), which has one ball without drift, on 10 x 5 cells.
    """

    parameters: ClassVar = {
        "fall": Parameter(3.0, "pixels that a ball falls in a step", 1, 8),
        "drift": Parameter(1.0, "largest pixels that a ball moves sideways in a step", 0, 4),
        "reach": Parameter(4.0, "pixels that the paddle moves in a step", 1, 8),
        "width": Parameter(5.0, "half the paddle's width, pixels", 1, 20),
        "negative": Parameter(False, "whether frames are black on white", 0, 1),
    }
    episode_limit = 200
    reward_threshold = 4.5
    state_size = 8
    noise_size = 2

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(0, 255, (FRAMES, PIXELS, PIXELS), np.uint8)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(3)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        return {**parameters, "colours": np.where(parameters["negative"] > 0, 255, 0).astype(np.uint8)}

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        draws = np.array([generator.random(3) for generator in generators]).reshape(-1, 3)
        state = np.zeros((len(draws), self.state_size))
        state[:, [X, PADDLE]] = RADIUS + draws[:, [0, 2]] * (PIXELS - 1 - 2 * RADIUS)
        state[:, DRIFT] = 2 * draws[:, 1] - 1
        state[:, LEFT] = BALLS
        state[:, [X_BEFORE, Y_BEFORE, PADDLE_BEFORE]] = state[:, [X, Y, PADDLE]]
        return state

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        after = state.copy()
        after[:, [X_BEFORE, Y_BEFORE, PADDLE_BEFORE]] = state[:, [X, Y, PADDLE]]
        paddle = state[:, PADDLE] + (actions - 1.0) * constants["reach"]
        after[:, PADDLE] = np.minimum(np.maximum(paddle, 0.0), PIXELS - 1.0)
        x = state[:, X] + state[:, DRIFT] * constants["drift"]
        bounced = np.minimum(np.maximum(x, RADIUS), PIXELS - 1.0 - RADIUS)
        after[:, DRIFT] = np.where(bounced == x, state[:, DRIFT], -state[:, DRIFT])
        after[:, X], after[:, Y] = bounced, state[:, Y] + constants["fall"]
        down = after[:, Y] >= FLOOR
        caught = np.abs(after[:, X] - after[:, PADDLE]) <= constants["width"] + RADIUS
        after[:, LEFT] -= down
        new_x = RADIUS + noise[:, 0] * (PIXELS - 1 - 2 * RADIUS)
        for column, value in ((X, new_x), (Y, 0.0), (DRIFT, 2 * noise[:, 1] - 1), (X_BEFORE, new_x), (Y_BEFORE, 0.0)):
            after[:, column] = np.where(down, value, after[:, column])
        return after, np.where(down, np.where(caught, 1.0, -1.0), 0.0), after[:, LEFT] <= 0

    def observe(self, state: Floats, constants: Constants) -> Array:
        before = _frames(state[:, X_BEFORE], state[:, Y_BEFORE], state[:, PADDLE_BEFORE], constants["width"])
        now = _frames(state[:, X], state[:, Y], state[:, PADDLE], constants["width"])
        return np.asarray(np.stack((before, now), 1) ^ constants["colours"][:, None, None, None])

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        constants = self.prepare({name: np.asarray(value)[None] for name, value in parameters.items()})

        def paint(state: Floats) -> Picture:
            frame = self.observe(state[None], constants)[0, -1]
            return np.repeat(np.kron(frame, np.ones((SCALE, SCALE), np.uint8))[:, :, None], 3, axis=2)

        return paint


def _frames(x: Floats, y: Floats, paddle: Floats, width: Floats) -> Array:
    """Draw balls at (x, y) [L] and paddles, white on black, [L, 42, 42] uint8."""
    pixels = np.arange(PIXELS)
    columns, rows = np.abs(pixels - x[:, None]) <= RADIUS, np.abs(pixels - y[:, None]) <= RADIUS
    frames = rows[:, :, None] & columns[:, None, :]
    under = np.abs(pixels - paddle[:, None]) <= width[:, None]
    frames[:, int(FLOOR) :] |= under[:, None]
    return frames.astype(np.uint8) * np.uint8(255)
