"""What clients remember between two rounds, on their own disk: a file for each client and round of a run.

In a deployment every message may reach a new process, so these files are the truth. What was saved or read last is kept
in memory too, and used as long as its file is the same one.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from grpo_fed.runs.files import link_or_copy, write_atomic

KEEP = 3
"""Rounds of a client that stay: a server that goes on from its last checkpoint may ask for one again."""

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""By name; not to be written into."""
FileVersion: TypeAlias = tuple[int, int, int]
"""Tells whether a file is still the one it was."""


@dataclass(frozen=True)
class _Kept:
    """What one file of a client holds."""

    path: Path
    mark: FileVersion
    arrays: Arrays


@final
class StateStore:
    """`<folder>/<run>/<client>/round-0003.safetensors`, each of them whole or not there."""

    def __init__(self, folder: Path, durable: bool = True) -> None:
        """Where it need not outlive the machine, not `durable` saves waiting for the disk."""
        self.folder = folder
        self.durable = durable
        self._last: dict[tuple[str, str], _Kept] = {}

    def path(self, run: str, client: str, round: int) -> Path:
        """Where a client's state after a round is."""
        return self._place(run, client) / f"round-{round:04d}.safetensors"

    def latest(self, run: str, client: str) -> int | None:
        """The last round that a client remembers of a run."""
        return max(self._rounds(run, client), default=None)

    def save(self, run: str, client: str, round: int, arrays: Arrays) -> None:
        """A client's state after a round. Later ones, which were made of a state that is no more, go, and old ones."""
        path = self.path(run, client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {name: np.array(array, order="C", copy=None) for name, array in arrays.items()}
        content = save(held)
        if self.durable:
            write_atomic(path, content)
        else:
            _write(path, content)
        self._last[run, client] = _Kept(path, _mark(path), held)
        there = self._rounds(run, client)
        until = [other for other in there if other <= round]
        for gone in {*there} - {*until[-KEEP:]}:
            self.path(run, client, gone).unlink(missing_ok=True)

    def load(self, run: str, client: str, before: int) -> tuple[int, Arrays] | None:
        """The latest state from before a round, and after which round it was; None if there is none."""
        round = max((other for other in self._rounds(run, client) if other < before), default=None)
        arrays = None if round is None else self.read(run, client, round)
        return None if round is None or arrays is None else (round, arrays)

    def earliest(self, run: str, client: str) -> tuple[int, Arrays] | None:
        """The first state that is still there, and after which round it was; None if there is none."""
        round = min(self._rounds(run, client), default=None)
        arrays = None if round is None else self.read(run, client, round)
        return None if round is None or arrays is None else (round, arrays)

    def read(self, run: str, client: str, round: int) -> Arrays | None:
        """The state after a round; None if it is not there, ValueError if it cannot be read.

        As long as the file is the same one, so is the answer.
        """
        path = self.path(run, client, round)
        known = self._last.get((run, client))
        try:
            mark = _mark(path)
            if known is None or known.path != path or known.mark != mark:
                known = self._last[run, client] = _Kept(path, mark, load(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path}: cannot be read as a client's state: {error}; remove it to go on without"
            ) from error
        return known.arrays

    def restore(self, run: str, client: str, file: Path, name: str) -> None:
        """Give a client what a file has that was called `name` here, and that nobody writes to."""
        place = self._place(run, client)
        place.mkdir(parents=True, exist_ok=True)
        link_or_copy(file, place / name)

    def _place(self, run: str, client: str) -> Path:
        for what, name in (("run", run), ("client", client)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"{what} {name!r}: it names a folder: letters, digits and _ . - would be right")
        return self.folder / run / client

    def _rounds(self, run: str, client: str) -> list[int]:
        """All that are there, in order."""
        try:
            names = [path.name for path in self._place(run, client).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"round-(\d+)\.safetensors", name)))


def _mark(path: Path) -> FileVersion:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all for whoever reads, but not for a machine that stops."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
