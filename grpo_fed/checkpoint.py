"""Checkpoints: all that a run must remember to go on after a round, in a folder that is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from grpo_fed.files import write_whole

CHECKPOINTS = "checkpoints"
STATE = "state.json"
CLIENTS = "clients"
PREFIX = "round-"
PART = ".part-"
"""Before the name of a checkpoint while it is written."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round."""

    round: int
    """From 1."""
    notes: Mapping[str, Any]
    """What the run has counted so far; JSON."""
    clients: Mapping[str, Arrays]
    """What every client must remember, by name."""


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Add a checkpoint to a run folder; the latest `keep` stay.

    It is written beside its place and moved there when every byte of it is on the disk.
    """
    home = folder / CHECKPOINTS
    name = f"{PREFIX}{checkpoint.round:04d}"
    part, place = home / f"{PART}{name}", home / name
    for old in (part, place):
        shutil.rmtree(old, ignore_errors=True)
    (part / CLIENTS).mkdir(parents=True)
    for client, arrays in checkpoint.clients.items():
        contiguous = {key: np.array(array, order="C") for key, array in arrays.items()}
        write_whole(part / CLIENTS / f"{client}.safetensors", save(contiguous))
    state = {"round": checkpoint.round, "clients": list(checkpoint.clients), "notes": checkpoint.notes}
    write_whole(part / STATE, json.dumps(state) + "\n")
    part.rename(place)
    _flush(home)
    for old in _places(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder, or None if there is none; ValueError if it cannot be read."""
    places = _places(folder)
    if not places:
        return None
    place = places[-1]
    try:
        state = json.loads((place / STATE).read_text())
        files = {client: place / CLIENTS / f"{client}.safetensors" for client in state["clients"]}
        clients = {client: load(file.read_bytes()) for client, file in files.items()}
        return Checkpoint(state["round"], state["notes"], clients)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cure = f"; remove it to go on from {places[-2].name}" if len(places) > 1 else ""
        raise ValueError(f"{place}: cannot be read as a checkpoint: {error}{cure}") from error


def remove(folder: Path) -> None:
    """All checkpoints of a run folder."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


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
