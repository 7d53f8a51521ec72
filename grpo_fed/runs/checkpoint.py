"""Checkpoints: all that a run must remember to go on after a round, in a folder that is whole or not there."""

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

CHECKPOINTS = "checkpoints"
STATE = "state.json"
SHARED = "shared.safetensors"
CLIENTS = "clients"
PREFIX = "round-"
PART = ".part-"
"""Before the name of a checkpoint while it is written."""

Arrays: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round."""

    round: int
    """From 1."""
    counters: Mapping[str, Any]
    """What the run has counted so far; JSON, and frozen dataclasses that become JSON."""
    clients: Mapping[str, Arrays] = field(default_factory=dict)
    """What every client must remember, by name; what was read has it in `files` instead."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The same as a file of each client that is never written to again: it gets a second name in the checkpoint."""
    shared: Arrays | None = None
    """The shared blocks of a federation."""
    original_names: Mapping[str, str] = field(default_factory=dict)
    """Of a checkpoint that was read: what each client's file was called where it came from."""
    folder: Path | None = None
    """Of a checkpoint that was read: its folder."""

    def states(self) -> dict[str, Arrays]:
        """What every client must remember, of a checkpoint that was read; ValueError if a file is damaged."""
        try:
            return {client: load(file.read_bytes()) for client, file in self.files.items()}
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, error) from error


def write(folder: Path, checkpoint: Checkpoint, keep: int, best: int | None = None) -> None:
    """Add a checkpoint to a run folder; the latest `keep` stay, and that of the round `best`.

    It is written beside its place and moved there when every byte of it is on the disk.
    """
    home = folder / CHECKPOINTS
    name = f"{PREFIX}{checkpoint.round:04d}"
    part, place = home / f"{PART}{name}", home / name
    for old in (part, place):
        shutil.rmtree(old, ignore_errors=True)
    (part / CLIENTS).mkdir(parents=True)
    for client, arrays in checkpoint.clients.items():
        write_atomic(part / CLIENTS / f"{client}.safetensors", _bytes(arrays))
    for client, file in checkpoint.files.items():
        link_or_copy(file, part / CLIENTS / f"{client}.safetensors")
    if checkpoint.shared is not None:
        write_atomic(part / SHARED, _bytes(checkpoint.shared))
    origins = {client: file.name for client, file in checkpoint.files.items()}
    clients = [*checkpoint.clients, *checkpoint.files]
    state = {"round": checkpoint.round, "clients": clients, "origins": origins, "notes": checkpoint.counters}
    write_atomic(part / STATE, json.dumps(state, default=vars) + "\n")
    _flush(part / CLIENTS)
    _flush(part)
    part.rename(place)
    _flush(home)
    for old in _places(folder)[:-keep]:
        if _number(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder, or None if there is none; ValueError if it cannot be read."""
    places = _places(folder)
    if not places:
        return None
    place = places[-1]
    try:
        state = json.loads((place / STATE).read_text())
        for key, kind in {"round": int, "notes": dict, "clients": list, "origins": dict}.items():
            if not isinstance(state[key], kind):
                raise ValueError(f"{STATE}: {key} is {state[key]!r}")
        files = {client: place / CLIENTS / f"{client}.safetensors" for client in state["clients"]}
        for file in files.values():
            with safe_open(file, "numpy"):  # whole as far as its header and its length can tell
                pass
        shared = load((place / SHARED).read_bytes()) if (place / SHARED).is_file() else None
        return Checkpoint(
            state["round"], state["notes"], files=files, shared=shared, original_names=state["origins"], folder=place
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(place, error) from error


def remove(folder: Path) -> None:
    """All checkpoints of a run folder."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _bytes(arrays: Arrays) -> bytes:
    return save({key: np.array(array, order="C") for key, array in arrays.items()})


def _damaged(place: Path | None, error: Exception) -> ValueError:
    """What to do about a checkpoint that cannot be read."""
    assert place is not None, "it was read"
    older = [other for other in _places(place.parents[1]) if _number(other) < _number(place)]
    cure = f"; remove it to go on from {older[-1].name}" if older else ""
    return ValueError(f"{place}: cannot be read as a checkpoint: {error}{cure}")


def _places(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = (folder / CHECKPOINTS).glob(f"{PREFIX}*")
    return sorted((place for place in found if place.name.removeprefix(PREFIX).isdigit()), key=_number)


def _number(place: Path) -> int:
    return int(place.name.removeprefix(PREFIX))


def _flush(folder: Path) -> None:
    """Names of a folder on the disk, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
