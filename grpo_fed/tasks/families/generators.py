"""Random generators of many episodes at once, each equal to the one that gymnasium's `np_random(seed)` makes.

Nearly all the time that `np_random` takes goes into numpy's SeedSequence, which turns the seed into the generator's
first state (O'Neill 2015, "Developing a seed_seq alternative"). Here the same arithmetic is done for all seeds in one
go; the numbers are drawn by numpy's own generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
from gymnasium.utils.seeding import np_random
from numpy.random import PCG64, Generator, SeedSequence
from numpy.random.bit_generator import ISpawnableSeedSequence

FEW = 16  # with fewer seeds, one after the other is faster
WORD = 2**32
POOL = 4  # words that a seed is mixed into
# As in numpy/random/bit_generator.pyx, whose results numpy promises not to change.
INIT_A, MULTIPLIER_A = 0x43B0D7E5, 0x931E8875
INIT_B, MULTIPLIER_B = 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = 0xCA01F9DD, 0x4973F715

Words = npt.NDArray[np.uint32]


def make_generators(seeds: Sequence[int | None]) -> list[Generator]:
    """Make the generators that `np_random` makes of these seeds; with None, one that cannot be repeated."""
    if len(seeds) < FEW or not all(seed is not None and 0 <= seed < WORD for seed in seeds):
        return [np_random(None if seed is None else int(seed))[0] for seed in seeds]
    states = seed_states(np.array(seeds, np.uint32))
    return [Generator(PCG64(_KnownState(seed, state))) for seed, state in zip(seeds, states, strict=True)]  # type: ignore[arg-type]


def seed_states(seeds: Words) -> npt.NDArray[np.uint64]:
    """Compute `SeedSequence(seed).generate_state(4, np.uint64)` of every seed, [n] -> [n, 4]."""
    constant = _HashConstant(INIT_A, MULTIPLIER_A)
    zeros = np.zeros_like(seeds)
    pool = [_hash(word, constant) for word in (seeds, zeros, zeros, zeros)]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                pool[target] = _mix(pool[target], _hash(pool[source], constant))
    constant = _HashConstant(INIT_B, MULTIPLIER_B)
    state = [_hash(pool[word % POOL], constant) for word in range(2 * POOL)]
    return np.stack(state, axis=1).astype("<u4").view("<u8").astype(np.uint64)


@final
class _HashConstant:
    """The constant of the hash function, which is multiplied by the same number with every use."""

    def __init__(self, first: int, multiplier: int) -> None:
        self.value, self.multiplier = first, multiplier

    def next(self) -> int:
        self.value = self.value * self.multiplier % WORD
        return self.value


def _hash(values: Words, constant: _HashConstant) -> Words:
    return _fold((values ^ np.uint32(constant.value)) * np.uint32(constant.next()))


def _mix(left: Words, right: Words) -> Words:
    return _fold(np.uint32(MIX_LEFT) * left - np.uint32(MIX_RIGHT) * right)


def _fold(values: Words) -> Words:
    return np.bitwise_xor(values, np.right_shift(values, np.uint32(16)))


@final
class _KnownState(ISpawnableSeedSequence):
    """A SeedSequence whose first state is known already. Its children are those of `SeedSequence(seed)`."""

    def __init__(self, seed: int, state: npt.NDArray[np.uint64]) -> None:
        self.seed, self.state = int(seed), state
        self.sequence: SeedSequence | None = None

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        if n_words == len(self.state) and np.dtype(dtype) == self.state.dtype:
            return self.state
        return self._sequence().generate_state(n_words, dtype)

    def spawn(self, n_children: int) -> list[SeedSequence]:  # type: ignore[override]  # they need not be of this class
        return self._sequence().spawn(n_children)

    def _sequence(self) -> SeedSequence:
        if self.sequence is None:
            self.sequence = SeedSequence(self.seed)
        return self.sequence
