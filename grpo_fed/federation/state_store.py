"""What clients remember between two rounds, on their own disk: a file for each client and round of a run.

In a deployment every message may reach a new process, so the files decide. The state that was saved or read last is
kept in memory too, and is used as long as its file has not changed.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from grpo_fed.runs.files import link_or_copy, make_private_folder, write_atomic

KEEP = 3
"""Rounds of a client that stay: a server that goes on from its last checkpoint may ask for one again."""
MOST_ANSWERS = KEEP - 1
"""The most times that a client trains in a round, with `round.again = "at-once"`: it could not repeat more of them."""
SESSION_NAME = "session.json"
FILE_NAME = re.compile(r"round-(\d+)\.safetensors")

log = logging.getLogger(__name__)

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""Arrays by name; not to be written into."""


@dataclass(frozen=True)
class StateVersion:
    """Identifies the content of a client's state: two states of a client with equal versions are the same."""

    run: str
    round: int
    file: tuple[int, int, int]
    """Time of the last change, inode and size: a file that is written again has others."""


@dataclass(frozen=True, eq=False)
class StoredState:
    """A client's state after a round."""

    round: int
    arrays: Arrays
    version: StateVersion


@final
class StateStore:
    """Files `<folder>/<run>/<client>/round-0003.safetensors`, each of them complete or absent."""

    def __init__(self, folder: Path, durable: bool = True) -> None:
        """Keep states in a folder.

        durable: wait for the disk whenever a state is saved; needed where states must survive a power cut.
        """
        self.folder = folder
        self.durable = durable
        self._last: dict[tuple[str, str], StoredState] = {}
        """By run and client, the state that was saved or read last."""

    def path(self, run: str, client: str, round: int) -> Path:
        """The file of a client's state after a round."""
        return self._folder_of(run, client) / f"round-{round:04d}.safetensors"

    def session_path(self, run: str, client: str) -> Path:
        """The file with a client's secrets of a round of secure aggregation; its folder is made."""
        folder = self._folder_of(run, client)
        self._make_folder(folder)
        return folder / SESSION_NAME

    def latest(self, run: str, client: str) -> int | None:
        """The last round of a run that a client has a state of."""
        return max(self._rounds(run, client), default=None)

    def save(self, run: str, client: str, round: int, arrays: Arrays) -> StoredState:
        """Write a client's state after a round; gives it as `read` would.

        States of later rounds are removed, since they follow from a state that is replaced, and so are old ones.
        """
        path = self.path(run, client, round)
        self._make_folder(path.parent)
        contiguous = {name: np.array(array, order="C", copy=None) for name, array in arrays.items()}
        content = save(contiguous)
        if self.durable:
            write_atomic(path, content, private=True)
        else:
            _write(path, content)
        stored = StoredState(round, contiguous, StateVersion(run, round, _file_version(path)))
        self._last[run, client] = stored
        rounds = self._rounds(run, client)
        until = [earlier for earlier in rounds if earlier <= round]
        for removed in {*rounds} - {*until[-KEEP:]}:
            self.path(run, client, removed).unlink(missing_ok=True)
        return stored

    def load(self, run: str, client: str, before: int) -> StoredState | None:
        """The latest whole state from before a round; None if there is none. Damaged files are set aside."""
        return self._first_whole(run, client, [round for round in self._rounds(run, client)[::-1] if round < before])

    def earliest(self, run: str, client: str) -> StoredState | None:
        """The earliest whole state that has not been removed; None if there is none. Damaged files are set aside."""
        return self._first_whole(run, client, self._rounds(run, client))

    def read(self, run: str, client: str, round: int) -> StoredState | None:
        """The state after a round; None if there is none, ValueError if its file cannot be read."""
        path = self.path(run, client, round)
        stored = self._last.get((run, client))
        try:
            version = StateVersion(run, round, _file_version(path))
            if stored is None or stored.version != version:
                stored = self._last[run, client] = StoredState(round, load(path.read_bytes()), version)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as a client's state: {error}") from error
        return stored

    def restore(self, run: str, client: str, file: Path, name: str) -> None:
        """Give a client the content of a file that nothing writes to, under the `name` that it had in this store.

        ValueError for a name that is none of this store; FileExistsError if the client has a file of that name.
        """
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r:.100} is no name of a client's state")
        folder = self._folder_of(run, client)
        self._make_folder(folder)
        link_or_copy(file, folder / name)

    def _first_whole(self, run: str, client: str, rounds: Iterable[int]) -> StoredState | None:
        """The first of these states that can be read; the files before it are renamed, so that nothing uses them."""
        for round in rounds:
            try:
                if (stored := self.read(run, client, round)) is not None:
                    return stored
            except ValueError as error:
                log.warning("client %s: %s; it goes on from an earlier state if it has one", client, error)
                path = self.path(run, client, round)
                path.replace(path.with_suffix(".damaged"))
        return None

    def _folder_of(self, run: str, client: str) -> Path:
        for kind, name in (("run", run), ("client", client)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"{kind} {name!r}: it names a folder: use letters, digits and _ . - only")
        return self.folder / run / client

    def _make_folder(self, folder: Path) -> None:
        """Make a client's folder, where its observations lie: only its owner may enter it."""
        if not folder.is_dir():
            if not self.folder.is_dir():
                make_private_folder(self.folder)
            for each in (folder.parent, folder):
                make_private_folder(each)

    def _rounds(self, run: str, client: str) -> list[int]:
        """All rounds that a client has a state of, in order."""
        try:
            names = [path.name for path in self._folder_of(run, client).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := FILE_NAME.fullmatch(name)))


def _file_version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _write(path: Path, content: bytes) -> None:
    """Write a file that readers see completely or not at all; it may be lost if the machine stops."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
