"""Random streams by name: a client's draws depend on its own seed, the purpose and a count, and on nothing else.

No generator outlives an update, so none has to be saved: (seed, purpose, number) names the draws.
"""

from __future__ import annotations

import zlib
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is used for."""

    EPISODES = 1
    ACTIONS = 2
    SHUFFLE = 3
    EVALUATION = 4
    CLUSTERS = 5
    STATES = 6
    FISHER = 7
    COMPARISON = 8
    PROMPTS = 9
    COMPLETIONS = 10
    PACE = 11
    LEVELS = 12
    ROLLBACK = 13
    PARTICIPATION = 20
    PRIVACY = 21


def client_seed(seed: int, client: str) -> int:
    """The seed of all of a client's streams, from the scenario's seed and the client's name."""
    return int(np.random.SeedSequence([seed, zlib.crc32(client.encode())]).generate_state(1, np.uint32)[0])


def generator(seed: int, purpose: Purpose, number: int = 0) -> np.random.Generator:
    """The stream of the client with this seed for a purpose, the `number`-th of its kind."""
    return np.random.default_rng([seed, purpose, number])


def env_seeds(seed: int, purpose: Purpose, copies: int, number: int = 0) -> np.ndarray:
    """Names of the streams of episodes of each copy of a client's environment, [copies] uint64."""
    return generator(seed, purpose, number).integers(0, 2**63, copies, dtype=np.uint64)
