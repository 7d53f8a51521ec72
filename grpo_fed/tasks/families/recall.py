"""Recall: remember a cue until it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import gymnasium
import numpy as np

from grpo_fed.tasks.families.base import Array, Constants, Family, Flags, Floats, Painter, Parameter, Picture

PIXELS = 64


@final
@dataclass(frozen=True)
class Recall(Family):
    """State: the cue, -1 or 1, and the step. The first observation shows the cue, and the one after `delay` more steps
    asks for it; those between show nothing.

    Observation: the cue or 0, and whether it is asked for. Actions: 0 for -1 and 1 for 1; only the answer counts. The
    reward is 1 for the right one and -1 for the wrong one, and it ends the episode. A policy without memory can only
    guess, which gives 0 on average. The memory length task of bsuite (1908.03568) with one bit.
    """

    parameters: ClassVar = {"delay": Parameter(8, "steps between the cue and the question", 1, 90)}
    episode_limit = 100
    reward_threshold = 0.95
    state_size = 2

    @property
    def observation_space(self) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(2)

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        return {"delay": np.round(parameters["delay"])}

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        return np.array([[1.0 if generator.random() < 0.5 else -1.0, 0.0] for generator in generators])

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        cue, number = state.T
        asked = number >= constants["delay"]
        rewards = np.where(asked, np.where(2.0 * actions - 1 == cue, 1.0, -1.0), 0.0)
        return np.array((cue, number + 1)).T, rewards, asked

    def observe(self, state: Floats, constants: Constants) -> Array:
        cue, number = state.T
        return np.array((np.where(number == 0, cue, 0.0), number == constants["delay"])).T.astype(np.float32)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        def paint(state: Floats) -> Picture:
            picture = np.full((PIXELS, 2 * PIXELS, 3), 230, np.uint8)
            if state[1] == 0:
                picture[:, :PIXELS] = (40, 80, 200) if state[0] > 0 else (200, 80, 40)
            if state[1] == round(float(parameters["delay"])):
                picture[:, PIXELS:] = (90, 190, 90)
            return picture

        return paint
