"""The requests of an exchange: their paths, and their bodies, which are JSON followed by contents.

A node's requests begin with `NODE`, those of a server's app with `APP`. A body is the number of bytes of its JSON, the
JSON, and the contents one after another, whose sizes the JSON has. Nothing is pickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = "/grpo-fed/"
NODE, APP = f"{ROOT}node/", f"{ROOT}app/"
"""The beginnings of the paths."""
WHO, NEXT, ANSWER = f"{NODE}who", f"{NODE}next", f"{NODE}answer"
"""A node gets its id and a pass; waits for a message; answers one."""
ASK, HEAR, STATUS = f"{APP}ask", f"{APP}hear", f"{APP}status"
"""An app hands messages over; waits for answers. Anyone on the SuperLink's machine asks what is connected."""
WAIT = 5.0
"""The most seconds for which a request waits."""
MARGIN = 25.0
"""Seconds after a request's wait before it counts as lost."""
SIZES = "sizes"
"""The key of the contents' sizes."""
HEAD = struct.Struct("<I")


class InvalidBodyError(ValueError):
    """A body is none of this protocol's."""


def encode(document: Mapping[str, Any], contents: Sequence[bytes] = ()) -> bytes:
    """Encode a body."""
    head = json.dumps({**document, SIZES: [len(content) for content in contents]}).encode()
    return b"".join((HEAD.pack(len(head)), head, *contents))


def decode(body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Decode a body into its JSON and its contents; InvalidBodyError if it is none."""
    try:
        (size,) = HEAD.unpack_from(body)
        document = json.loads(body[HEAD.size : HEAD.size + size])
        sizes, at = document.pop(SIZES), HEAD.size + size
        contents = []
        for size in sizes:
            if size < 0 or at + size > len(body):
                raise ValueError("a content is cut off")
            contents.append(body[at : at + size])
            at += size
    except (struct.error, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidBodyError(f"the body cannot be read: {error}") from None
    return document, contents
