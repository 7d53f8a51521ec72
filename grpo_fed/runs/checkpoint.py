"""Checkpoints: all that a run needs to go on after a round, in a folder that is complete or missing.

A checkpoint holds the SHA-256 of each of its files, in the form of `sha256sum -c`, and is read only if all of them fit:
whatever happened to the disk since, a run goes on from the bytes that were written, or from an older checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from grpo_fed.policy.shared_names import CHECKPOINTS
from grpo_fed.policy.shared_names import SHARED_BLOCKS_FILE as SHARED
from grpo_fed.runs.files import link_or_copy, make_private_folder, refuse_links, write_atomic
from grpo_fed.runs.serialisation import Record, from_json, to_json

STATE = "state.json"
CLIENTS = "clients"
SUMS = "SHA256SUMS"
"""The file with the digests of all others."""
PREFIX = "round-"
PARTIAL = ".part-"
"""Prefix of a checkpoint's name while it is written."""
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
ORIGINAL_NAME = re.compile(r"round-\d+\.safetensors")
"""The name of a file of a client's state."""
SUMS_LINE = re.compile(r"([0-9a-f]{64})  ((?:clients/)?[A-Za-z0-9][A-Za-z0-9_.-]*)")

Arrays: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """Holds a run's state after a round."""

    round: int
    """The round's number, from 1."""
    parts: Mapping[str, Any]
    """The state of each part of the run, by the part's name: JSON, and dataclasses that become JSON."""
    clients: Mapping[str, Arrays] = field(default_factory=dict)
    """Every client's state; a checkpoint that was read has it in `files` instead."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Each client's state as a file that is never written to again; the checkpoint links to it."""
    shared: Arrays | None = None
    """The shared blocks of a federation."""
    original_names: Mapping[str, str] = field(default_factory=dict)
    """In a checkpoint that was read: the name of the file that each client's state was linked from."""
    folder: Path | None = None
    """The folder of a checkpoint that was read."""
    passed_over: tuple[str, ...] = ()
    """In a checkpoint that was read: what else of its run is damaged, a sentence for each."""

    def part(self, name: str, kind: type[Record]) -> Record:
        """Read the state of a part as a record; ValueError if it is missing or damaged."""
        try:
            return from_json(kind, self.parts[name])
        except KeyError as error:
            raise _wrong(self.folder, ValueError(f"{STATE}: it has no {name}")) from error
        except ValueError as error:
            raise _wrong(self.folder, ValueError(f"{STATE}: {name}: {error}")) from error

    def states(self) -> dict[str, Arrays]:
        """Read every client's state; ValueError if a file is damaged."""
        try:
            return {client: load(file.read_bytes()) for client, file in self.files.items()}
        except (OSError, SafetensorError) as error:
            raise _wrong(self.folder, error) from error


def write(folder: Path, checkpoint: Checkpoint, keep: int, best: int | None = None) -> None:
    """Add a checkpoint to a run's folder; remove all but the latest `keep` and that of the round `best`.

    It is written under another name and renamed when every byte of it is on the disk.
    """
    checkpoints = folder / CHECKPOINTS
    name = f"{PREFIX}{checkpoint.round:04d}"
    partial, final = checkpoints / f"{PARTIAL}{name}", checkpoints / name
    for old in (partial, final):
        shutil.rmtree(old, ignore_errors=True)
    make_private_folder(partial / CLIENTS)
    written = {_client_file(client): _bytes(arrays) for client, arrays in checkpoint.clients.items()}
    if checkpoint.shared is not None:
        written[SHARED] = _bytes(checkpoint.shared)
    is_copy = checkpoint.folder is not None
    origins = checkpoint.original_names if is_copy else {name: file.name for name, file in checkpoint.files.items()}
    clients = [*checkpoint.clients, *checkpoint.files]
    state = {"round": checkpoint.round, "clients": clients, "origins": origins, "parts": checkpoint.parts}
    written[STATE] = (to_json(state) + "\n").encode()
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in written.items()}
    for client, file in checkpoint.files.items():
        link_or_copy(file, partial / _client_file(client))
        digests[_client_file(client)] = _digest(file)
    for path, content in written.items():
        write_atomic(partial / path, content, private=path.startswith(f"{CLIENTS}/"))
    write_atomic(partial / SUMS, "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items())))
    _flush(partial / CLIENTS)
    _flush(partial)
    partial.rename(final)
    _flush(checkpoints)
    for old in _list_checkpoints(folder)[:-keep]:
        if _round_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint of a run's folder, which names the damaged ones that are newer; None if there
    is no checkpoint at all; ValueError if all are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_list_checkpoints(folder)):
        try:
            return replace(_read(path), passed_over=tuple(damaged))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            damaged.append(f"{path}: is damaged: {reason}")
    if damaged:
        raise ValueError(f"{damaged[0]}; no other checkpoint is whole; start the run again with --out and --replace")
    return None


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint; an error of any kind if it is not what was written."""
    names = _verify(path)
    state = json.loads((path / STATE).read_bytes())
    for key, kind in {"round": int, "parts": dict, "clients": list, "origins": dict}.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise ValueError(f"{STATE} has no {key}")
    if state["round"] != _round_of(path):
        raise ValueError(f"{STATE} is that of round {state['round']}")
    clients, origins = state["clients"], state["origins"]
    for pattern, given in ((CLIENT_NAME, clients), (CLIENT_NAME, origins), (ORIGINAL_NAME, origins.values())):
        for name in given:
            if not isinstance(name, str) or not pattern.fullmatch(name):
                raise ValueError(f"{STATE} names {name!r:.100}, which is no name of a client or of its file")
    files = {client: path / _client_file(client) for client in clients}
    if missing := [client for client in clients if _client_file(client) not in names]:
        raise ValueError(f"{_client_file(missing[0])} is missing")
    shared = load((path / SHARED).read_bytes()) if SHARED in names else None
    return Checkpoint(state["round"], state["parts"], files=files, shared=shared, original_names=origins, folder=path)


def _verify(path: Path) -> set[str]:
    """Compare the files of a checkpoint with their digests, and return their names in it; ValueError if one is not the
    file that was written, or is a link.
    """
    run = path.parents[1]
    refuse_links(run, path / SUMS)
    names = set()
    for line in (path / SUMS).read_text(encoding="utf-8").splitlines():
        if (fields := SUMS_LINE.fullmatch(line)) is None:
            raise ValueError(f"{SUMS} has a line that is no digest of a file")
        digest, name = fields.groups()
        refuse_links(run, path / name)
        if _digest(path / name) != digest:
            raise ValueError(f"{name} does not have the SHA-256 that is in {SUMS}")
        names.add(name)
    if STATE not in names:
        raise ValueError(f"{SUMS} lacks {STATE}")
    return names


def _client_file(client: str) -> str:
    """Name a client's file in a checkpoint."""
    return f"{CLIENTS}/{client}.safetensors"


def _bytes(arrays: Arrays) -> bytes:
    return save({key: np.array(array, order="C") for key, array in arrays.items()})


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _wrong(path: Path | None, error: Exception) -> ValueError:
    """Make the error for a checkpoint that is whole and does not fit, with its cure."""
    assert path is not None, "the checkpoint was read from a folder"
    older = [other for other in _list_checkpoints(path.parents[1]) if _round_of(other) < _round_of(path)]
    cure = f"; remove it to go on from {older[-1].name}" if older else ""
    return ValueError(f"{path}: cannot be read as a checkpoint: {error}{cure}")


def _list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run's folder, oldest first."""
    paths = (folder / CHECKPOINTS).glob(f"{PREFIX}*")
    return sorted((path for path in paths if path.name.removeprefix(PREFIX).isdecimal()), key=_round_of)


def _round_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _flush(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
