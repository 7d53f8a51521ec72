"""What a policy with memory sees: an observation, its memory, and a mark where an episode begins, side by side.

So the memory is carried by what is collected, saved and measured on, and nothing else has to know of it. K clients, N
copies of each one's environment, D entries of an observation, H numbers of a memory.
"""

from __future__ import annotations

import numpy as np

from grpo_fed.rl.actor import Actor


def attach_memory(observations: np.ndarray, memory: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Put memories and marks beside observations, [..., D], [..., H] and [...] bool -> [..., D + H + 1] float32.

    begins: where an observation is the first of an episode; a memory is 0 there.
    """
    marks = begins[..., None]
    parts = (observations, np.where(marks, np.float32(0.0), memory), marks.astype(np.float32))
    return np.concatenate(parts, -1, dtype=np.float32)


def attach_first(observations: np.ndarray, size: int) -> np.ndarray:
    """Give observations [..., D] that begin episodes an empty memory of H = `size`; as they are if this is 0."""
    if not size:
        return observations
    shape = observations.shape[:-1]
    return attach_memory(observations, np.zeros((*shape, size), np.float32), np.ones(shape, bool))


def with_memory(observations: np.ndarray, actor: Actor, begins: bool) -> np.ndarray:
    """Give observations [K, N, D] the memory that an actor has of the step before, or that with which all begin.

    begins: whether the observations are the first of their episodes. They stay as they are without a memory.
    """
    if begins or not actor.policy.memory_size:
        return attach_first(observations, actor.policy.memory_size)
    return attach_memory(observations, actor.memory, np.zeros(observations.shape[:-1], bool))
