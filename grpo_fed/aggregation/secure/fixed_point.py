"""Numbers as integers modulo 2^32, so that a sum of them is exact, in whatever order it is made.

The sum of K clients' numbers, each of a size of `reach` at most, is within 31 bits and a sign.
"""

from __future__ import annotations

import numpy as np

LARGEST_SUM = 2**31 - 1


def resolution(reach: float, clients: int) -> float:
    """Compute the difference of two neighbouring numbers in a sum of so many clients."""
    return reach / (LARGEST_SUM // clients)


def to_words(values: np.ndarray, reach: float, clients: int) -> tuple[np.ndarray, int]:
    """Round numbers [N] to integers modulo 2^32, [N] uint32, and count those that were cut to `reach`.

    ValueError for numbers that are not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("what was learned is not finite, and a sum with it would not be either")
    cut = int((np.abs(values) > reach).sum())
    steps = np.rint(np.clip(values.astype(np.float64), -reach, reach) / resolution(reach, clients))
    words: np.ndarray = steps.astype(np.int64).astype(np.uint32)
    return words, cut


def from_words(total: np.ndarray, reach: float, clients: int) -> np.ndarray:
    """Return the sum [N] float64 of numbers whose words add up to `total` [N] uint32."""
    values: np.ndarray = total.view(np.int32).astype(np.float64) * resolution(reach, clients)
    return values
