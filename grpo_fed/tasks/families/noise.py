"""Random numbers for many lanes, each from a stream of its own, drawn a block ahead so that a step costs one gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
import numpy.typing as npt

BLOCK = 128  # steps drawn ahead; drawing costs a call a lane


@final
class Noise:
    """The k-th numbers that a lane takes depend on the generator it was given, and on no other lane."""

    def __init__(
        self, lanes: int, size: int, draw: Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]]
    ) -> None:
        self.draw = draw
        self.ahead = np.zeros((lanes, BLOCK, size))
        self.used = np.full(lanes, BLOCK)
        self.streams: dict[int, np.random.Generator] = {}

    def restart(self, lane: int, generator: np.random.Generator) -> None:
        """Give the lane a new stream, a child of `generator`, whose own draws stay as they are."""
        (self.streams[lane],) = generator.spawn(1)
        self.used[lane] = BLOCK

    def take(self, lanes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The next numbers of these lanes, sorted and each named once; 0 for the others, [L, size]."""
        used = self.used[lanes]
        empty = used == BLOCK
        if np.count_nonzero(empty):
            for lane in lanes[empty].tolist():
                self.ahead[lane] = self.draw(self.streams[lane], self.ahead.shape[1:])
            used[empty] = 0
        self.used[lanes] = used + 1
        if len(lanes) == len(self.used):
            return np.asarray(self.ahead[lanes, used])
        taken = np.zeros((len(self.used), self.ahead.shape[2]))
        taken[lanes] = self.ahead[lanes, used]
        return taken
