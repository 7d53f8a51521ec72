"""NoiseStreams: random numbers for many env copies, each from a stream of its own.

Numbers are drawn a block ahead, so that a step costs one gather for all copies instead of a call for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt

BLOCK = 128  # steps drawn ahead; drawing costs a call for each env copy


@final
class NoiseStreams:
    """The k-th numbers that an env copy takes depend on the generator it was given, and on no other copy."""

    def __init__(
        self,
        num_envs: int,
        size: int,
        sample: Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]],
    ) -> None:
        """size: numbers for a step of one env copy. sample: draws an array of a given shape from a generator."""
        self.sample = sample
        self.ahead = np.zeros((num_envs, BLOCK, size))
        self.used = np.full(num_envs, BLOCK)
        self.streams: dict[int, np.random.Generator] = {}

    def restart(self, copy: int, generator: np.random.Generator) -> None:
        """Give an env copy a new stream, a child of `generator`, whose own numbers stay as they are."""
        (self.streams[copy],) = generator.spawn(1)
        self.used[copy] = BLOCK

    def take(self, copies: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Take the next numbers of some env copies, [L, size] with 0 for the others.

        copies: their indices, sorted and without repeats.
        """
        used = self.used[copies]
        is_empty = used == BLOCK
        if np.count_nonzero(is_empty):
            for copy in copies[is_empty].tolist():
                self.ahead[copy] = self.sample(self.streams[copy], self.ahead.shape[1:])
            used[is_empty] = 0
        self.used[copies] = used + 1
        if len(copies) == len(self.used):
            return np.asarray(self.ahead[copies, used])
        taken = np.zeros((len(self.used), self.ahead.shape[2]))
        taken[copies] = self.ahead[copies, used]
        return taken
