"""Vectors as Flower's arrays, and the groups of one that travel."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import final

import numpy as np
from flwr.app import Array

from grpo_fed.engines.wire.validation import InvalidMessageError, show


def write(vector: np.ndarray) -> Array:
    """As `numpy.save` would, but with the one header that `read` knows for its length, and need not parse."""
    vector = np.ascontiguousarray(vector, "<f4")
    return Array("float32", vector.shape, "numpy.ndarray", b"".join((_header(vector.size), vector.data)))


def read(place: str, array: Array, size: int) -> np.ndarray:
    """[size] float32, a view that cannot be written to."""
    if (array.dtype, array.shape, array.stype) != ("float32", (size,), "numpy.ndarray"):
        has = f"{show(array.dtype)} of shape {show(array.shape)} as {show(array.stype)}"
        raise InvalidMessageError(f"{place} is {has}; it has to be float32 of shape ({size},) as numpy.ndarray")
    header, data = _header(size), array.data
    if type(data) is not bytes or len(data) != len(header) + 4 * size or not data.startswith(header):
        raise InvalidMessageError(f"{place} says that it is float32 of shape ({size},), but its bytes are not")
    vector: np.ndarray = np.frombuffer(data, "<f4", offset=len(header))
    return vector


@lru_cache(maxsize=256)
def _header(size: int) -> bytes:
    """What numpy's format, version 1, has before the values of a vector."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size},), }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def refuse_non_finite(place: str, vector: np.ndarray) -> None:
    """`Refused`, with the first entry that is not finite."""
    finite = np.isfinite(vector)
    if not finite.all():
        at = int(finite.argmin())
        raise InvalidMessageError(f"{place} is {vector[at]} at entry {at}; it has to be finite")


@final
class GroupSelection:
    """The groups of S columns, for what travels in parts."""

    def __init__(self, ids: np.ndarray, number: int) -> None:
        order = ids.argsort(kind="stable")
        self._ids, self._number = ids, number
        self._order = None if (order[1:] > order[:-1]).all() else order
        self._sizes = np.bincount(ids, minlength=number)
        self._firsts = self._sizes.cumsum() - self._sizes

    def changed(self, vector: np.ndarray, other: np.ndarray) -> np.ndarray:
        """[G] bool: where two vectors [S] are not the same, bit for bit."""
        if not self._number:
            return np.zeros(0, bool)
        columns = vector.view(np.uint32) != other.view(np.uint32)
        columns = columns if self._order is None else columns[self._order]
        found: np.ndarray = np.logical_or.reduceat(columns, self._firsts)
        return found

    def part(self, vector: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """[S] -> the columns of the groups chosen [G], in their order."""
        return vector if chosen.all() else vector[chosen[self._ids]]

    def fill(self, values: np.ndarray, chosen: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """The inverse of `part`: a vector [S] of its own, elsewhere as `rest` [S]."""
        if chosen.all():
            return values.copy()
        vector = rest.copy()
        vector[chosen[self._ids]] = values
        return vector

    def count(self, chosen: np.ndarray) -> int:
        """How many columns these groups have."""
        return int(self._sizes[chosen].sum())

    def mask(self, numbers: Iterable[int]) -> bytes:
        """Groups by number, as bits."""
        chosen = np.zeros(self._number, bool)
        chosen[list(numbers)] = True
        return self.pack(chosen)

    def pack(self, chosen: np.ndarray) -> bytes:
        """[G] bool, as bits, and one more that is 0: Flower counts no record of no bytes."""
        return np.packbits(np.append(chosen, False)).tobytes()

    def chosen(self, place: str, mask: bytes) -> np.ndarray:
        """The inverse of `pack`."""
        bits = np.unpackbits(np.frombuffer(mask, np.uint8)).astype(bool)
        if len(mask) != self._number // 8 + 1 or bits[self._number :].any():
            raise InvalidMessageError(f"{place} is {show(mask)}; it has to be a bit for each of {self._number} groups")
        return bits[: self._number]
