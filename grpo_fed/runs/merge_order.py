"""The order of events of a run whose rounds do not wait: `order.jsonl` in its folder, a line for each merge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grpo_fed.runs.files import append_line, write_atomic
from grpo_fed.runs.serialisation import from_json, parse_json, to_json

ORDER = "order.jsonl"


@dataclass(frozen=True)
class MergeOrder:
    """What happened up to a merge since the one before."""

    merge: int
    """From 1."""
    told: tuple[str, ...]
    """The clients that were given work."""
    came: tuple[tuple[str, int, int], ...]
    """The answers that were merged: the client, the number of merges when it was given the work, and the number of its
    work, from 1 for each client."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """The clients whose work had no valid answer, with the kind of the failure."""
    digest: str = ""
    """The digest of the shared blocks after the merge."""


def digest_shared(shared: np.ndarray) -> str:
    """Compute the SHA-256 of shared blocks."""
    return hashlib.sha256(np.ascontiguousarray(shared, "<f4").tobytes()).hexdigest()


def append_order(folder: Path, order: MergeOrder) -> None:
    """Add the line of a merge."""
    append_line(folder / ORDER, to_json(order), durable=True)


def cut_orders(folder: Path, merges: int) -> None:
    """Remove the lines of later merges than the first `merges`, for a run that goes on from there."""
    path = folder / ORDER
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_atomic(path, "".join(lines[:merges]))


def read_orders(folder: Path) -> dict[int, MergeOrder]:
    """Read the order of a run's events, by merge; ValueError if there is none, or it is damaged."""
    path = folder / ORDER
    if not path.is_file():
        raise ValueError(f'{folder}: there is no {ORDER} in it, which runs with round.mode = "buffered" write')
    try:
        orders = [from_json(MergeOrder, parse_json(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    if [order.merge for order in orders] != [*range(1, len(orders) + 1)]:
        raise ValueError(f"{path}: is damaged: its merges are not numbered from 1")
    return {order.merge: order for order in orders}
