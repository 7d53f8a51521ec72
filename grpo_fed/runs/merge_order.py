"""The order of events of a run whose rounds do not wait: `order.jsonl` in its folder, a line for each merge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from grpo_fed.runs.files import append_line, refuse_links, write_atomic
from grpo_fed.runs.serialisation import from_json, parse_json, to_json

ORDER = "order.jsonl"


@dataclass(frozen=True)
class MergeOrder:
    """What happened up to a merge since the one before."""

    merge: int
    """From 1."""
    told: tuple[str, ...]
    """The clients that were given work since the merge before; with `round.again = "at-once"`, those that had waited
    for that merge."""
    came: tuple[tuple[str, int, int], ...]
    """The answers that came, in their order: the client, the number of merges when it was given the work, and the
    number of its work, from 1 for each client. One that began too long ago was refused."""
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
    """Remove the lines of later merges than these, and a part of a line, for a run that goes on from there."""
    path = folder / ORDER
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_atomic(path, "".join(line for line in lines if _is_until(line, merges)))


def _is_until(line: str, merges: int) -> bool:
    """Return whether a line is whole and of one of these merges."""
    try:
        return line.endswith("\n") and from_json(MergeOrder, parse_json(line)).merge <= merges
    except ValueError:
        return False


def read_orders(folder: Path) -> dict[int, MergeOrder]:
    """Read the order of a run's events, by merge; ValueError if there is none, or it is damaged."""
    path = folder / ORDER
    refuse_links(folder, path)
    if not path.is_file():
        raise ValueError(f'{folder}: there is no {ORDER} in it, which runs with round.mode = "buffered" write')
    try:
        orders = [from_json(MergeOrder, parse_json(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    if orders and orders[0].merge > 1 and _is_in_order(orders):
        raise ValueError(f"{path}: begins with merge {orders[0].merge}, since the run goes on from another one")
    if not _is_in_order(orders) or (orders and orders[0].merge != 1):
        raise ValueError(f"{path}: is damaged: its merges are not numbered from 1")
    return {order.merge: order for order in orders}


def _is_in_order(orders: Sequence[MergeOrder]) -> bool:
    """Return whether the merges of lines follow each other."""
    return all(later.merge == earlier.merge + 1 for earlier, later in pairwise(orders))
