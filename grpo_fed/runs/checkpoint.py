"""Checkpoints: all that a run needs to go on after a round, in a folder that is complete or missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from grpo_fed.runs.files import link_or_copy, write_atomic
from grpo_fed.runs.serialisation import Record, from_json, to_json

CHECKPOINTS = "checkpoints"
STATE = "state.json"
SHARED = "shared.safetensors"
CLIENTS = "clients"
PREFIX = "round-"
PARTIAL = ".part-"
"""Prefix of a checkpoint's name while it is written."""

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

    def part(self, name: str, kind: type[Record]) -> Record:
        """Read the state of a part as a record; ValueError if it is missing or damaged."""
        try:
            return from_json(kind, self.parts[name])
        except (KeyError, ValueError) as error:
            raise _damaged(self.folder, ValueError(f"{STATE}: {name}: {error}")) from error

    def states(self) -> dict[str, Arrays]:
        """Read every client's state; ValueError if a file is damaged."""
        try:
            return {client: load(file.read_bytes()) for client, file in self.files.items()}
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, error) from error


def write(folder: Path, checkpoint: Checkpoint, keep: int, best: int | None = None) -> None:
    """Add a checkpoint to a run's folder; remove all but the latest `keep` and that of the round `best`.

    It is written under another name and renamed when every byte of it is on the disk.
    """
    checkpoints = folder / CHECKPOINTS
    name = f"{PREFIX}{checkpoint.round:04d}"
    partial, final = checkpoints / f"{PARTIAL}{name}", checkpoints / name
    for old in (partial, final):
        shutil.rmtree(old, ignore_errors=True)
    (partial / CLIENTS).mkdir(parents=True)
    for client, arrays in checkpoint.clients.items():
        write_atomic(partial / CLIENTS / f"{client}.safetensors", _bytes(arrays))
    for client, file in checkpoint.files.items():
        link_or_copy(file, partial / CLIENTS / f"{client}.safetensors")
    if checkpoint.shared is not None:
        write_atomic(partial / SHARED, _bytes(checkpoint.shared))
    origins = {client: file.name for client, file in checkpoint.files.items()}
    clients = [*checkpoint.clients, *checkpoint.files]
    state = {"round": checkpoint.round, "clients": clients, "origins": origins, "parts": checkpoint.parts}
    write_atomic(partial / STATE, to_json(state) + "\n")
    _flush(partial / CLIENTS)
    _flush(partial)
    partial.rename(final)
    _flush(checkpoints)
    for old in _list_checkpoints(folder)[:-keep]:
        if _round_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint of a run's folder; None if there is none; ValueError if it cannot be read."""
    checkpoints = _list_checkpoints(folder)
    if not checkpoints:
        return None
    path = checkpoints[-1]
    try:
        state = json.loads((path / STATE).read_text())
        for key, kind in {"round": int, "parts": dict, "clients": list, "origins": dict}.items():
            if not isinstance(state[key], kind):
                raise ValueError(f"{STATE}: {key} is {state[key]!r}")
        files = {client: path / CLIENTS / f"{client}.safetensors" for client in state["clients"]}
        for file in files.values():
            with safe_open(file, "numpy"):  # raises if the file is shorter than its header says
                pass
        shared = load((path / SHARED).read_bytes()) if (path / SHARED).is_file() else None
        return Checkpoint(
            state["round"], state["parts"], files=files, shared=shared, original_names=state["origins"], folder=path
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _bytes(arrays: Arrays) -> bytes:
    return save({key: np.array(array, order="C") for key, array in arrays.items()})


def _damaged(path: Path | None, error: Exception) -> ValueError:
    """Make the error for a checkpoint that cannot be read, with its cure."""
    assert path is not None, "the checkpoint was read from a folder"
    older = [other for other in _list_checkpoints(path.parents[1]) if _round_of(other) < _round_of(path)]
    cure = f"; remove it to go on from {older[-1].name}" if older else ""
    return ValueError(f"{path}: cannot be read as a checkpoint: {error}{cure}")


def _list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run's folder, oldest first."""
    paths = (folder / CHECKPOINTS).glob(f"{PREFIX}*")
    return sorted((path for path in paths if path.name.removeprefix(PREFIX).isdigit()), key=_round_of)


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
