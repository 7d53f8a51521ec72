"""Secrets in shares (Shamir 1979): values of a random polynomial over a prime field, whose value at 0 is the secret.

Any `threshold` of the shares give the secret; fewer tell nothing about it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

PRIME = 2**521 - 1
SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, threshold: int, shares: int) -> list[int]:
    """Split a secret of 32 bytes into shares, the values at 1, 2, ..."""
    assert len(secret) == SECRET_BYTES, "secrets have 32 bytes"
    assert 1 <= threshold <= shares, "all shares together are enough"
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    values = []
    for at in range(1, shares + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * at + coefficient) % PRIME
        values.append(value)
    return values


def interpolate_at(shares: Mapping[int, int], at: int) -> int:
    """Compute the value at a place of the polynomial through these values, by Lagrange's formula."""
    total = 0
    for place, value in shares.items():
        above = below = 1
        for other in shares:
            if other != place:
                above, below = above * (at - other) % PRIME, below * (place - other) % PRIME
        total = (total + value * above * pow(below, -1, PRIME)) % PRIME
    return total


def combine(shares: Mapping[int, int]) -> bytes | None:
    """Find the secret from shares by their places; None if it is none of 32 bytes, so that a share is wrong."""
    value = interpolate_at(shares, 0)
    return value.to_bytes(SECRET_BYTES, "big") if value.bit_length() <= 8 * SECRET_BYTES else None
