"""What this process and its workers say to each other: JSON and safetensors over a socket, never pickle.

An array that several clients are sent travels once in a frame.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from grpo_fed.federation.messages import (
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)

SIZES = struct.Struct("<QQ")
"""Bytes of JSON and of arrays that follow."""
RECORD_TYPES = {
    kind.__name__: kind
    for kind in (Train, Measure, Evaluate, Start, EvaluationPlan, Trained, Measured, Evaluated, EvaluationSummary)
}
IS = "is"
"""The key that says which record an object is; a mapping of ours has none."""
ARRAY = "array"


def send(link: socket.socket, content: Mapping[str, Any], until: float | None = None) -> None:
    """Strings, numbers, arrays, records of `messages` and mappings and sequences of them.

    TimeoutError if it is not all taken by `until`, on the monotonic clock.
    """
    arrays: dict[int, np.ndarray] = {}
    head = json.dumps(_encode(content, arrays), default=_number).encode()
    body = save({str(number): np.ascontiguousarray(array) for number, array in enumerate(arrays.values())})
    link.settimeout(_left(until))
    link.sendall(SIZES.pack(len(head), len(body)) + head)
    link.sendall(body)


def receive(link: socket.socket, until: float | None = None) -> dict[str, Any]:
    """What `send` sent, with tuples for sequences. EOFError if the other end is gone, TimeoutError as there."""
    head, body = SIZES.unpack(_read(link, SIZES.size, until))
    told = json.loads(_read(link, head, until))
    found = _decode(told, load(bytes(_read(link, body, until))))
    assert isinstance(found, dict)
    return found


def _encode(thing: Any, arrays: dict[int, np.ndarray]) -> Any:
    """As JSON, with the arrays put aside under their ids; they are numbered in that order."""
    if isinstance(thing, np.ndarray):
        arrays.setdefault(id(thing), thing)
        return {IS: ARRAY, "number": list(arrays).index(id(thing))}
    if isinstance(thing, Mapping):
        return {name: _encode(value, arrays) for name, value in thing.items()}
    if isinstance(thing, tuple | list):
        return [_encode(value, arrays) for value in thing]
    if is_dataclass(thing):
        parts = {field.name: _encode(getattr(thing, field.name), arrays) for field in fields(thing)}
        return {IS: type(thing).__name__, **parts}
    return thing


def _decode(told: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse."""
    if isinstance(told, list):
        return tuple(_decode(value, arrays) for value in told)
    if not isinstance(told, dict):
        return told
    kind = told.pop(IS, None)
    if kind == ARRAY:
        return arrays[str(told["number"])]
    parts = {name: _decode(value, arrays) for name, value in told.items()}
    return parts if kind is None else RECORD_TYPES[kind](**parts)


def _number(value: Any) -> Any:
    """Of numpy's scalars, what JSON knows."""
    return value.item()


def _read(link: socket.socket, size: int, until: float | None) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        link.settimeout(_left(until))
        count = link.recv_into(rest)
        if not count:
            raise EOFError("the other end is gone")
        rest = rest[count:]
    return data


def _left(until: float | None) -> float | None:
    """Seconds: never 0, which would mean not to wait at all, and no more than the system takes."""
    return None if until is None else min(86_400.0, max(1e-3, until - time.monotonic()))
