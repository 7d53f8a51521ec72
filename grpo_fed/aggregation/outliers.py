"""What clients say of themselves, against each other: medians that no single client moves.

A client's own number has no part in what it is compared with, and numbers of 0 have none either: a client that shares
nothing of a block has a KL of 0 for it, and says nothing about those that do.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence


def medians_of_others(values: Mapping[str, float]) -> dict[str, float]:
    """Find the upper median of all other clients' numbers that are above 0 and finite, for every client.

    It is infinite where fewer than two others have such a number: then nobody can tell who is right.
    """
    known = sorted(value for value in values.values() if 0 < value < math.inf)
    medians = {}
    for name, value in values.items():
        is_known = 0 < value < math.inf
        count = len(known) - is_known
        middle = count // 2
        if is_known and bisect_left(known, value) <= middle:
            middle += 1
        medians[name] = known[middle] if count >= 2 else math.inf
    return medians


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Find the least number that is not below those of clients with half of the weight; infinity without any weight."""
    total = math.fsum(weights)
    passed = 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        passed += weight
        if weight > 0 and passed >= total / 2:
            return value
    return math.inf
