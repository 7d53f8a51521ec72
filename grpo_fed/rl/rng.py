"""Random streams by name: what a client draws depends on its own seed, the purpose and a count, and on nothing else.

No generator lives on between two updates, so nothing of it has to be saved: (seed, purpose, number) names the draws.
"""

from __future__ import annotations

import zlib
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for."""

    EPISODES = 1
    ACTIONS = 2
    SHUFFLE = 3
    EVALUATION = 4
    CLUSTERS = 5
    STATES = 6
    FISHER = 7
    PARTICIPATION = 20


def client_seed(seed: int, client: str) -> int:
    """The scenario's seed and the client's name make the seed of all that the client draws."""
    return int(np.random.SeedSequence([seed, zlib.crc32(client.encode())]).generate_state(1, np.uint32)[0])


def generator(seed: int, purpose: Purpose, number: int = 0) -> np.random.Generator:
    """The stream of a client (by its seed) for a purpose, the `number`-th of its kind."""
    return np.random.default_rng([seed, purpose, number])


def env_seeds(seed: int, purpose: Purpose, lanes: int, number: int = 0) -> np.ndarray:
    """[lanes] uint64: for each copy of a client's task the name of its stream of episodes."""
    return generator(seed, purpose, number).integers(0, 2**63, lanes, dtype=np.uint64)
