"""Vectors as Flower's arrays, and selections of their parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import final

import numpy as np
from flwr.app import Array

from grpo_fed.engines.wire.validation import InvalidMessageError, show

FORMATS = {"float32": "<f4", "float16": "<f2", "uint32": "<u4"}
"""Numpy's names of the number formats that travel."""


def encode_vector(vector: np.ndarray, dtype: str = "float32") -> Array:
    """Encode a vector of floats as `numpy.save` would, with the one header that `decode_vector` knows."""
    vector = np.ascontiguousarray(vector, FORMATS[dtype])
    return Array(dtype, vector.shape, "numpy.ndarray", b"".join((_header(vector.size, dtype), vector.data)))


def decode_vector(name: str, array: Array, size: int, dtype: str = "float32") -> np.ndarray:
    """Decode an array to [size] of a dtype: a view of its bytes that cannot be written to.

    The header is compared, not parsed, so that no header can make numpy do anything else. name: where the array stands
    in the message, for InvalidMessageError if it is no such vector.
    """
    if (array.dtype, array.shape, array.stype) != (dtype, (size,), "numpy.ndarray"):
        has = f"{show(array.dtype)} of shape {show(array.shape)} as {show(array.stype)}"
        raise InvalidMessageError(f"{name} is {has}; it has to be {dtype} of shape ({size},) as numpy.ndarray")
    header, data, width = _header(size, dtype), array.data, np.dtype(FORMATS[dtype]).itemsize
    if type(data) is not bytes or len(data) != len(header) + width * size or not data.startswith(header):
        raise InvalidMessageError(f"{name} claims to be {dtype} of shape ({size},), but its bytes are not")
    vector: np.ndarray = np.frombuffer(data, FORMATS[dtype], offset=len(header))
    return vector


@lru_cache(maxsize=256)
def _header(size: int, dtype: str) -> bytes:
    """Return what stands before the values of a vector in version 1 of numpy's file format."""
    text = f"{{'descr': '{FORMATS[dtype]}', 'fortran_order': False, 'shape': ({size},), }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def check_finite(name: str, vector: np.ndarray) -> None:
    """Raise InvalidMessageError with the first entry that is not finite."""
    finite = np.isfinite(vector)
    if not finite.all():
        at = int(finite.argmin())
        raise InvalidMessageError(f"{name} is {vector[at]} at entry {at}; it has to be finite")


@final
class GroupSelection:
    """Selects whole parameter groups of a vector, so that only those that changed have to travel.

    A selection is a mask [G] bool; in a message it is a bit for each group.
    """

    def __init__(self, ids: np.ndarray, count: int) -> None:
        """ids: [S], the group of every column, 0 to count - 1."""
        order = ids.argsort(kind="stable")
        self._ids, self._count = ids, count
        self._order = None if (order[1:] > order[:-1]).all() else order
        self._sizes = np.bincount(ids, minlength=count)
        self._firsts = self._sizes.cumsum() - self._sizes

    def select_changed(self, vector: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Select the groups [G] in which two vectors [S] differ in any bit."""
        if not self._count:
            return np.zeros(0, bool)
        columns = vector.view(np.uint32) != reference.view(np.uint32)
        columns = columns if self._order is None else columns[self._order]
        groups: np.ndarray = np.logical_or.reduceat(columns, self._firsts)
        return groups

    def extract(self, vector: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Return the columns of a vector [S] that belong to the selected groups [G], in the vector's order."""
        return vector if groups.all() else vector[groups[self._ids]]

    def fill(self, values: np.ndarray, groups: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """Invert `extract`: return a new vector [S] with these values in the selected groups, `rest` [S] elsewhere."""
        if groups.all():
            return values.copy()
        vector = rest.copy()
        vector[groups[self._ids]] = values
        return vector

    def count_columns(self, groups: np.ndarray) -> int:
        """Count the columns of the selected groups [G]."""
        return int(self._sizes[groups].sum())

    def pack_numbers(self, numbers: Iterable[int]) -> bytes:
        """Pack the selection of groups with these numbers into bits."""
        groups = np.zeros(self._count, bool)
        groups[list(numbers)] = True
        return self.pack(groups)

    def pack(self, groups: np.ndarray) -> bytes:
        """Pack a selection [G] into bits, and one more that is 0: Flower cannot count an empty field."""
        return np.packbits(np.append(groups, False)).tobytes()

    def unpack(self, name: str, mask: bytes) -> np.ndarray:
        """Unpack a selection [G]; InvalidMessageError, naming the field, if it has another number of bits."""
        bits = np.unpackbits(np.frombuffer(mask, np.uint8)).astype(bool)
        if len(mask) != self._count // 8 + 1 or bits[self._count :].any():
            raise InvalidMessageError(f"{name} is {show(mask)}; it has to be a bit for each of {self._count} groups")
        return bits[: self._count]
