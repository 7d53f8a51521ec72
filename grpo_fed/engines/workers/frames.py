"""Requests and replies between processes: JSON and safetensors over a socket, never pickle.

An array that several clients are sent, such as the shared blocks, is in a frame once.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from grpo_fed.federation.messages import (
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    MaskPlan,
    Measure,
    Measured,
    SecureParts,
    SecureStep,
    SharingComparison,
    Start,
    Train,
    Trained,
)

SIZES = struct.Struct("<QQ")
"""The header of a frame: how many bytes of JSON and of safetensors follow."""
RECORD_TYPES = {
    kind.__name__: kind
    for kind in (
        Train,
        Measure,
        Evaluate,
        Start,
        EvaluationPlan,
        Trained,
        Measured,
        Evaluated,
        EvaluationSummary,
        SharingComparison,
        MaskPlan,
        SecureStep,
        SecureParts,
    )
}
"""The records that a frame may hold, by name."""
RECORD_TYPE = "is"
"""The key that says which record a JSON object is; a mapping has no such key."""
ARRAY = "array"
"""The record type of an array, which is in the safetensors under its index."""
MAX_TIMEOUT_SECONDS = 86_400.0
"""The longest timeout of a socket: the system does not accept much longer ones."""


def make_request(
    path: Sequence[str],
    function: str,
    settings: Mapping[str, Any] | None,
    chunk: tuple[str, ...],
    instructions: Mapping[str, Any],
) -> dict[str, Any]:
    """Make the request to a worker that `RequestHandler.reply` understands.

    path: the `sys.path` with which the worker imports. function, settings: the `ClientFactory` of the clients.
    chunk: all clients that are made together. instructions: what some of them are asked, by name.
    """
    return {
        "path": path,
        "function": function,
        "settings": settings,
        "chunk": chunk,
        "instructions": instructions,
    }


def send(link: socket.socket, content: Mapping[str, Any], deadline: float | None = None) -> None:
    """Send a frame.

    content: strings, numbers, arrays, records of `federation.messages`, and mappings and sequences of them.
    deadline: on the monotonic clock. Raises TimeoutError if the other end has not accepted everything by then.
    """
    arrays: dict[int, np.ndarray] = {}
    head = json.dumps(_encode(content, arrays), default=_as_python_number).encode()
    body = save({str(index): np.ascontiguousarray(array) for index, array in enumerate(arrays.values())})
    link.settimeout(_timeout(deadline))
    link.sendall(SIZES.pack(len(head), len(body)) + head)
    link.sendall(body)


def receive(link: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Receive the content of a frame, with tuples for sequences.

    Raises EOFError if the other end has closed the socket, TimeoutError if the frame is not complete by the deadline.
    """
    head, body = SIZES.unpack(_read(link, SIZES.size, deadline))
    document = json.loads(_read(link, head, deadline))
    content = _decode(document, load(bytes(_read(link, body, deadline))))
    assert isinstance(content, dict)
    return content


def _encode(value: Any, arrays: dict[int, np.ndarray]) -> Any:
    """Turn a value into JSON, and collect its arrays under their ids; an array's index is its place among them."""
    if isinstance(value, np.ndarray):
        arrays.setdefault(id(value), value)
        return {RECORD_TYPE: ARRAY, "index": list(arrays).index(id(value))}
    if isinstance(value, Mapping):
        return {name: _encode(part, arrays) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(part, arrays) for part in value]
    if is_dataclass(value):
        parts = {field.name: _encode(getattr(value, field.name), arrays) for field in fields(value)}
        return {RECORD_TYPE: type(value).__name__, **parts}
    return value


def _decode(document: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Undo `_encode`."""
    if isinstance(document, list):
        return tuple(_decode(part, arrays) for part in document)
    if not isinstance(document, dict):
        return document
    kind = document.pop(RECORD_TYPE, None)
    if kind == ARRAY:
        return arrays[str(document["index"])]
    parts = {name: _decode(part, arrays) for name, part in document.items()}
    return parts if kind is None else RECORD_TYPES[kind](**parts)


def _as_python_number(value: Any) -> Any:
    """Turn a numpy scalar into a number that JSON has."""
    return value.item()


def _read(link: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        link.settimeout(_timeout(deadline))
        count = link.recv_into(rest)
        if not count:
            raise EOFError("the other end has closed the socket")
        rest = rest[count:]
    return data


def _timeout(deadline: float | None) -> float | None:
    """Return the seconds until a deadline; never 0, which would mean not to wait at all."""
    return None if deadline is None else min(MAX_TIMEOUT_SECONDS, max(1e-3, deadline - time.monotonic()))
