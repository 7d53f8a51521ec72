"""What the server does in a round of secure aggregation: it chooses neighbours, and takes the masks off the sum."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

from grpo_fed.aggregation.secure.participant import (
    PLACE_BYTES,
    REVEALED_BYTES,
    own_mask_key,
    pair_mask_key,
    threshold_of,
)
from grpo_fed.aggregation.secure.primitives import KEY_BYTES, commit, public_of, stream
from grpo_fed.aggregation.secure.shamir import combine, interpolate_at

MOST_NEIGHBOURS = 32
"""Neighbours of a client where there are more: its work then does not grow with the number of clients."""


class SecureSumError(ValueError):
    """The masks of a sum cannot be taken off; the text says why."""


def choose_neighbours(clients: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Choose each client's neighbours: all others if they are few, else those next to it on a ring in random order."""
    ring = sorted(clients)
    if len(ring) <= MOST_NEIGHBOURS + 1:
        return {name: tuple(other for other in ring if other != name) for name in ring}
    secrets.SystemRandom().shuffle(ring)
    steps = [step for distance in range(1, MOST_NEIGHBOURS // 2 + 1) for step in (distance, -distance)]
    return {name: tuple(sorted(ring[(at + step) % len(ring)] for step in steps)) for at, name in enumerate(ring)}


@final
@dataclass(frozen=True)
class Session:
    """What the server knows of a round's clients before they train."""

    id: bytes
    keys: Mapping[str, bytes]
    """Public keys of the clients that agreed on keys."""
    neighbours: Mapping[str, tuple[str, ...]]
    commitments: Mapping[str, bytes] = field(default_factory=dict)
    """Of the clients that sent shares, and may send masked numbers."""

    def peers_of(self, client: str) -> tuple[str, ...]:
        """Return the neighbours with which a client masks its numbers: those that sent shares."""
        return tuple(name for name in self.neighbours[client] if name in self.commitments)

    def threshold(self, client: str) -> int:
        """Return how many shares give a client's secret."""
        return threshold_of(len(self.neighbours[client]))

    def unmask(
        self, total: np.ndarray, answered: Sequence[str], revealed: Mapping[str, Mapping[str, bytes]]
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Take all masks off the sum [N] uint32 of the masked numbers of the clients that answered.

        revealed: by client that hands them out, the shares by the client that they belong to. Return the plain sum, and
        the clients whose wrong shares were in the way. SecureSumError if there are too few.
        """
        wrong: set[str] = set()
        plain = total.copy()
        for name in answered:
            secret = self._recover(name, revealed, wrong, True)
            plain -= stream(own_mask_key(secret, self.id), len(plain))
        present = set(answered)
        for name in (each for each in self.commitments if each not in present):
            key = self._recover(name, revealed, wrong, False)
            for peer in self.peers_of(name):
                if peer in present:
                    pair = stream(pair_mask_key(key, self.keys[peer], self.id, name, peer), len(plain))
                    plain = plain - pair if peer < name else plain + pair
        return plain, tuple(sorted(wrong))

    def _recover(self, name: str, revealed: Mapping[str, Mapping[str, bytes]], wrong: set[str], is_own: bool) -> bytes:
        """Find a client's own secret, or its masking key, from shares of which one may be wrong, and note whose."""
        places, threshold = sorted(self.neighbours[name]), self.threshold(name)
        shares: dict[int, int] = {}
        for at, holder in enumerate(places, 1):
            share = revealed.get(holder, {}).get(name)
            if share is None:
                continue
            if len(share) != REVEALED_BYTES or int.from_bytes(share[:PLACE_BYTES], "big") != at:
                wrong.add(holder)
                continue
            shares[at] = int.from_bytes(share[PLACE_BYTES:], "big")
        what = "mask" if is_own else "masking key"
        for left_out in (None, *shares):
            chosen = dict([each for each in shares.items() if each[0] != left_out][:threshold])
            if len(chosen) < threshold:
                break
            secret = combine(chosen)
            if secret is not None and self._is_right(name, secret, is_own):
                if left_out is not None:
                    wrong |= {places[at - 1] for at, value in shares.items() if interpolate_at(chosen, at) != value}
                return secret
        if len(shares) >= threshold:
            raise SecureSumError(f"shares of the {what} of {name} are wrong, and those left are too few to do without")
        raise SecureSumError(
            f"too many clients were lost: {threshold} shares of the {what} of {name} are needed, and {len(shares)} came"
        )

    def _is_right(self, name: str, secret: bytes, is_own: bool) -> bool:
        if is_own:
            return commit(secret, self.id) == self.commitments[name]
        return public_of(secret) == self.keys[name][KEY_BYTES:]
