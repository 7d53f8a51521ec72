from __future__ import annotations

import numpy as np

from grpo_fed.engines.wire.vector_cache import VectorCache


class Encoder:
    """Encodes vectors through a cache, and counts how often it had to."""

    def __init__(self, size: int = 8) -> None:
        self.cache: VectorCache[bytes] = VectorCache(size)
        self.count = 0

    def encode(self, *vectors: np.ndarray | None) -> bytes:
        def make() -> bytes:
            self.count += 1
            return b"".join(vector.tobytes() for vector in vectors if vector is not None)

        return self.cache.get(vectors, make)


def test_the_same_vectors_are_encoded_once():
    encoder = Encoder()
    shared, candidate = np.zeros(3, np.float32), np.ones(3, np.float32)
    first = encoder.encode(shared, candidate)
    assert encoder.encode(shared, candidate) is first
    assert encoder.count == 1
    assert encoder.encode(shared, None) == shared.tobytes()
    assert encoder.count == 2, "another pair of vectors has an entry of its own"


def test_a_changed_vector_is_encoded_again():
    encoder = Encoder()
    vector = np.zeros(3, np.float32)
    encoder.encode(vector)
    vector[1] = -0.0  # equal to 0, but of other bits
    assert encoder.encode(vector) == vector.tobytes() != bytes(12)
    assert encoder.count == 2
    encoder.encode(vector)
    assert encoder.count == 2


def test_an_equal_vector_at_another_address_is_encoded_for_itself():
    encoder = Encoder()
    assert encoder.encode(np.zeros(3, np.float32)) == encoder.encode(np.zeros(3, np.float32))
    assert encoder.count == 2, "entries hold their vectors, so that no new vector gets an old one's address"


def test_a_vector_that_is_not_a_number_is_still_recognised():
    encoder = Encoder()
    vector = np.full(3, np.nan, np.float32)
    assert encoder.encode(vector) is encoder.encode(vector)


def test_the_entry_that_was_used_longest_ago_is_dropped_first():
    encoder = Encoder(size=2)
    first, second, third = (np.full(3, number, np.float32) for number in range(3))
    for vector in (first, second, first, third):
        encoder.encode(vector)
    assert encoder.count == 3
    encoder.encode(first)
    assert encoder.count == 3
    encoder.encode(second)
    assert encoder.count == 4


def test_bytes_are_recognised_without_a_copy():
    cache: VectorCache[np.ndarray] = VectorCache()
    data = np.arange(3, dtype=np.float32).tobytes()
    first = cache.get((data,), lambda: np.frombuffer(data, np.float32))
    assert cache.get((data,), lambda: np.zeros(3, np.float32)) is first
