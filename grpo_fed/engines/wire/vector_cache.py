"""A cache of encoded and decoded vectors: many clients get the same shared blocks, which need encoding only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar, final

import numpy as np

Source: TypeAlias = np.ndarray | bytes | None
Made = TypeVar("Made")


@final
class VectorCache(Generic[Made]):
    """Keeps what was made from the last few vectors.

    An entry is found by the identity of its sources, which costs nothing to compare, and is valid as long as they have
    not been written to, which a copy shows. Bytes cannot be written to and are not copied.
    """

    def __init__(self, size: int = 8) -> None:
        """size: how many entries are kept, those that were used last."""
        self._size = size
        self._entries: dict[tuple[int, ...], _Entry[Made]] = {}

    def get(self, sources: tuple[Source, ...], make: Callable[[], Made]) -> Made:
        """Return what `make` returned for these very sources, calling it only if they are new or were changed."""
        key = tuple(map(id, sources))
        entry = self._entries.pop(key, None)
        if entry is None or not entry.is_valid:
            entry = _Entry(sources, tuple(map(_copy, sources)), make())
        self._entries[key] = entry
        while len(self._entries) > self._size:
            del self._entries[next(iter(self._entries))]
        return entry.made


@dataclass(frozen=True, eq=False)
class _Entry(Generic[Made]):
    sources: tuple[Source, ...]
    """As long as they are held here, no other objects have their ids."""
    copies: tuple[Source, ...]
    """The sources as they were when they were encoded or decoded."""
    made: Made

    @property
    def is_valid(self) -> bool:
        """Whether every source still has the bits of its copy."""
        return all(_has_same_bits(*pair) for pair in zip(self.sources, self.copies, strict=True))


def _copy(source: Source) -> Source:
    return source.copy() if isinstance(source, np.ndarray) else source


def _has_same_bits(source: Source, copy: Source) -> bool:
    if isinstance(source, np.ndarray) and isinstance(copy, np.ndarray):
        return np.array_equal(source.view(np.uint32), copy.view(np.uint32))
    return source is copy
