"""Collected steps: client by client when a collection is done, step by step while it goes on.

K clients with N copies of their environments each; L = K * N copies are stepped together, those of one client next to
each other. T steps, D observation entries, A action entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from grpo_fed.rl.records import Episode
from grpo_fed.tasks.envs.base import EnvStep


@dataclass(frozen=True)
class Truncation:
    """A place where an episode was truncated."""

    client: int
    """Row of the client."""
    t: int
    """Step of the batch."""
    copy: int
    """Copy of the client's environment, 0 to N - 1."""
    observation: np.ndarray
    """[D]: the last observation, as the policy sees it."""


@dataclass(frozen=True)
class Trajectories:
    """Collected steps, before the critic judges them."""

    observations: np.ndarray
    """[K, T, N, D] float32, or uint8 of pictures: as the policy saw them."""
    actions: np.ndarray
    """[K, T, N, A] float32."""
    rewards: np.ndarray
    """[K, T, N] float32: normalised if the scenario says so."""
    terminated: np.ndarray
    """[K, T, N] bool."""
    truncated: np.ndarray
    """[K, T, N] bool."""
    valid: np.ndarray
    """[K, T, N] bool: False for steps that must not be learned from."""
    last: np.ndarray
    """[K, N, D]: the observations after the last step; with whole episodes, those that they began with."""
    cuts: list[Truncation]
    """Where episodes were truncated."""
    episodes: list[list[Episode]]
    """The finished episodes of each client."""
    costs: np.ndarray | None = None
    """[K, T, N] float32: what the actions cost; None where no cost is read."""

    @cached_property
    def steps(self) -> np.ndarray:
        """[K]: number of steps that are learned from."""
        return np.asarray(self.valid.sum((1, 2)))


@dataclass(frozen=True)
class StepBuffer:
    """Steps of one collection while it goes on, [T, L, ...]."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    """Raw rewards."""
    normalised: np.ndarray
    """Normalised rewards, where there is a normaliser."""
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    finals: list[np.ndarray]
    """[L, D] for each step: the raw observations that it led to, also at the end of an episode."""
    memories: list[np.ndarray]
    """[K, N, H] for each step: what the policies remember after it."""
    costs: np.ndarray | None
    """What the actions cost; None where no cost is read."""

    @classmethod
    def empty(cls, steps: int, observations: np.ndarray, action: int, costs: bool = False) -> StepBuffer:
        """Arrays for steps of L copies, with this number of action entries.

        observations: [L, D] such as come. costs: whether costs are read.
        """
        copies, size = observations.shape
        shape = (steps, copies)
        return cls(
            observations=np.empty((*shape, size), observations.dtype),
            actions=np.empty((*shape, action), np.float32),
            rewards=np.empty(shape),
            normalised=np.empty(shape, np.float32),
            terminated=np.empty(shape, bool),
            truncated=np.empty(shape, bool),
            valid=np.empty(shape, bool),
            finals=[],
            memories=[],
            costs=np.empty(shape) if costs else None,
        )

    def write(self, t: int, observations: np.ndarray, actions: np.ndarray, step: EnvStep, memory: np.ndarray) -> None:
        """Write a step of all copies. memory: [K, N, H], after it."""
        self.observations[t] = observations.reshape(actions.shape[0], -1)
        self.actions[t] = actions
        self.rewards[t] = step.rewards
        self.terminated[t] = step.terminated
        self.truncated[t] = step.truncated
        self.valid[t] = step.valid
        self.finals.append(step.final_observations)
        self.memories.append(memory)
        if self.costs is not None:
            self.costs[t] = step.costs


def by_client(array: np.ndarray, clients: int, copies: int) -> np.ndarray:
    """Put steps in order of clients, [T, L, ...] -> [K, T, N, ...]."""
    return np.ascontiguousarray(array.reshape(len(array), clients, copies, *array.shape[2:]).swapaxes(0, 1))
