"""RandomMDP: small tabular Markov decision processes, sampled at random, whose values can be computed exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import gymnasium
import numpy as np

from grpo_fed.tasks.families.base import Array, Constants, Family, Flags, Floats, Painter, Parameter, Picture

PIXELS = 32


@final
@dataclass(frozen=True)
class RandomMDP(Family):
    """State: its number. Transitions and rewards are tables sampled with `seed`, mixed with common ones if `kappa` is
    below 1. Episodes never terminate.
    """

    states: int = 6
    """Number of states."""
    actions: int = 3
    """Number of actions."""

    parameters: ClassVar = {
        "seed": Parameter(0, "seed of the transition and reward tables", 0, 2**53),
        "common": Parameter(0, "seed of tables that several tasks have in common", 0, 2**53),
        "kappa": Parameter(1.0, "part of the tables that is the task's own, 1 for all; the rest is common", 0, 1),
    }
    episode_limit = 100
    reward_threshold = None
    state_size = 1
    noise_size = 1

    def __post_init__(self) -> None:
        for name, value, least in (("states", self.states, 1), ("actions", self.actions, 1)):
            if not float(value).is_integer() or value < least:
                raise ValueError(f"RandomMDP: {name}: {value!r}: give a whole number from {least}")

    @property
    def observation_space(self) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(self.states)

    @property
    def action_space(self) -> gymnasium.spaces.Discrete:
        return gymnasium.spaces.Discrete(self.actions)

    def tables(self, seed: int, common: int = 0, kappa: float = 1.0) -> tuple[Floats, Floats]:
        """Sample P[s, a, s'], each row uniform over the simplex, and R[s, a], uniform from 0 to 1; then mix them with
        the tables of the seed `common`: kappa x own + (1 - kappa) x common.
        """
        generator = np.random.default_rng(seed)
        transitions = generator.dirichlet(np.ones(self.states), size=(self.states, self.actions))
        rewards = generator.random((self.states, self.actions))
        if kappa == 1:
            return transitions, rewards
        common_transitions, common_rewards = self.tables(common)
        mixed = kappa * transitions + (1 - kappa) * common_transitions
        return mixed, kappa * rewards + (1 - kappa) * common_rewards

    def prepare(self, parameters: Mapping[str, Floats]) -> Constants:
        given = zip(parameters["seed"], parameters["common"], parameters["kappa"], strict=True)
        pairs = [self.tables(int(seed), int(common), float(kappa)) for seed, common, kappa in given]
        transitions, rewards = (np.stack(tables) for tables in zip(*pairs, strict=True))
        return {
            "P": transitions,
            "R": rewards,
            "edges": transitions.cumsum(axis=3)[..., :-1],
            "copies": np.arange(len(pairs)),
        }

    def start(self, generators: Sequence[np.random.Generator]) -> Floats:
        return np.array([[generator.integers(self.states)] for generator in generators], dtype=np.float64)

    def step(self, state: Floats, actions: Array, constants: Constants, noise: Floats) -> tuple[Floats, Floats, Flags]:
        entry = (constants["copies"], state[:, 0].astype(np.int64), actions)
        successor = np.count_nonzero(noise >= constants["edges"][entry], axis=1)  # inverts the cumulative distribution
        return successor[:, None].astype(np.float64), constants["R"][entry], np.zeros(len(state), dtype=np.bool_)

    def observe(self, state: Floats, constants: Constants) -> Array:
        return state[:, 0].astype(np.int64)

    def painter(self, parameters: Mapping[str, Floats]) -> Painter:
        def paint(state: Floats) -> Picture:
            picture = np.full((PIXELS, PIXELS * self.states, 3), 220, dtype=np.uint8)
            picture[:, ::PIXELS] = 255
            picture[:, int(state[0]) * PIXELS + 1 : (int(state[0]) + 1) * PIXELS] = (40, 80, 200)
            return picture

        return paint
