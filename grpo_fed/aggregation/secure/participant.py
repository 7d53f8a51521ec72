"""What a client does in a round of secure aggregation: keys, shares, masks, and shares again.

1. It makes two keys and a secret for this session, and sends the public halves.
2. It gets its neighbours' public keys, and sends each neighbour a share of one key and of the secret, encrypted.
3. It adds to its numbers the stream of its secret, and for each neighbour that has sent shares the stream of the key
   that both agree on, with opposite signs.
4. It hears which of its neighbours have answered, and hands out its share of their secret, or of the key of those that
   have not: never both, so that the server cannot take the masks off a single client.

A neighbour's shares are enough from `threshold_of` on, more than two thirds, so less than a third of a client's
neighbours can work together with the server without learning what it sends.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self, final

import numpy as np

from grpo_fed.aggregation.secure.primitives import (
    KEY_BYTES,
    TAG_BYTES,
    InvalidShareError,
    agree,
    commit,
    decrypt,
    derive,
    encrypt,
    public_of,
    stream,
)
from grpo_fed.aggregation.secure.shamir import SHARE_BYTES, split

LEAST_NEIGHBOURS = 2
"""With fewer, one other client could tell from the sum what this one sent."""
PLACE_BYTES = 2
SHARES_BYTES = PLACE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
"""Of what a client sends a neighbour."""
REVEALED_BYTES = PLACE_BYTES + SHARE_BYTES
"""Of a share that is handed out."""


def threshold_of(neighbours: int) -> int:
    """Return how many shares give a client's secret; ValueError with too few neighbours."""
    if neighbours < LEAST_NEIGHBOURS:
        raise ValueError(
            f"a client with {neighbours} others could be told apart in their sum: at least three have to take part"
        )
    return 2 * neighbours // 3 + 1


@final
@dataclass(frozen=True)
class Participant:
    """A client's secrets for a session."""

    name: str
    session: bytes
    encryption_key: bytes
    masking_key: bytes
    own_secret: bytes

    @classmethod
    def new(cls, name: str, session: bytes) -> Self:
        """Make new secrets from the operating system's random numbers."""
        return cls(name, session, *(secrets.token_bytes(KEY_BYTES) for _ in range(3)))

    @property
    def public_keys(self) -> bytes:
        """The public halves of both keys, one after the other."""
        return public_of(self.encryption_key) + public_of(self.masking_key)

    @property
    def commitment(self) -> bytes:
        """A hash of the own secret."""
        return commit(self.own_secret, self.session)

    def share(self, keys: Mapping[str, bytes]) -> dict[str, bytes]:
        """Share the masking key and the own secret with the neighbours.

        keys: the neighbours' public keys by name. Return what each is sent, encrypted for it.
        """
        threshold = threshold_of(len(keys))
        parts = zip(*(split(each, threshold, len(keys)) for each in (self.masking_key, self.own_secret)), strict=True)
        return {
            name: encrypt(
                self._encryption_with(keys[name], self.name, name),
                place.to_bytes(PLACE_BYTES, "big") + b"".join(part.to_bytes(SHARE_BYTES, "big") for part in both),
                self.session,
            )
            for place, (name, both) in enumerate(zip(sorted(keys), parts, strict=True), 1)
        }

    def mask(self, words: np.ndarray, keys: Mapping[str, bytes]) -> np.ndarray:
        """Mask numbers [N] uint32. keys: public keys of the neighbours that have sent shares."""
        masked: np.ndarray = words + stream(own_mask_key(self.own_secret, self.session), len(words))
        for name, key in keys.items():
            pair = stream(pair_mask_key(self.masking_key, key, self.session, self.name, name), len(words))
            masked = masked + pair if self.name < name else masked - pair
        return masked

    def reveal(
        self, keys: Mapping[str, bytes], sent: Mapping[str, bytes], answered: Collection[str]
    ) -> dict[str, bytes]:
        """Hand out the share of each neighbour's own secret if it has answered, of its masking key if it has not.

        keys: the neighbours' public keys. sent: what they have sent this client, encrypted. A neighbour whose shares
        were changed on their way, or never were any, is left out: it can spoil the sum, not what others hand out.
        """
        revealed = {}
        for name, message in sent.items():
            try:
                content = decrypt(self._encryption_with(keys[name], name, self.name), message, self.session)
            except InvalidShareError:
                continue
            place, rest = content[:PLACE_BYTES], content[PLACE_BYTES:]
            revealed[name] = place + (rest[SHARE_BYTES:] if name in answered else rest[:SHARE_BYTES])
        return revealed

    def _encryption_with(self, public_keys: bytes, sender: str, receiver: str) -> bytes:
        return agree(self.encryption_key, public_keys[:KEY_BYTES], self.session, f"share from {sender} to {receiver}")


def own_mask_key(secret: bytes, session: bytes) -> bytes:
    """Derive the key of the mask that a client has for itself."""
    return derive(secret, session, "own mask")


def pair_mask_key(private: bytes, public_keys: bytes, session: bytes, one: str, other: str) -> bytes:
    """Derive the key of the mask of two clients, the same for both."""
    return agree(private, public_keys[KEY_BYTES:], session, f"mask of {' and '.join(sorted((one, other)))}")
