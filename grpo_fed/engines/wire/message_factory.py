"""Instruction messages outside a Flower run: all that we use of Flower beyond what it documents.

Flower makes them for the process that a task of a run has been given to, and its link numbers them. A federation in one
process has neither, so it writes their metadata itself. `tests/engines/test_local.py` holds Flower to this.
"""

from __future__ import annotations

import itertools
import time

from flwr.app import DEFAULT_TTL, Message, Metadata, RecordDict

RUN, SERVER = 1, 0
"""Ids; those of nodes go from 1."""

_numbers = itertools.count(1)


def make_message(content: RecordDict, kind: str, node: int, group: str = "", ttl: float | None = None) -> Message:
    """A message to a node, with an id of its own."""
    metadata = Metadata(
        run_id=RUN,
        message_id=str(next(_numbers)),
        src_node_id=SERVER,
        dst_node_id=node,
        reply_to_message_id="",
        group_id=group,
        created_at=time.time(),
        ttl=DEFAULT_TTL if ttl is None else ttl,
        message_type=kind,
    )
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload, no-any-return]
