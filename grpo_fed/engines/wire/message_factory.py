"""Makes messages outside a Flower run: the only place that relies on what Flower does not document.

Flower makes messages in a process that was given a task of a run, and its link numbers them. A federation in one
process has neither, so the metadata are written here. `tests/engines/test_local.py` shows that Flower accepts them.
"""

from __future__ import annotations

import itertools
import time

from flwr.app import DEFAULT_TTL, Message, Metadata, RecordDict

RUN, SERVER = 1, 0
"""The ids of the run and of the server's node; those of the clients' nodes count from 1."""

_ids = itertools.count(1)


def make_message(content: RecordDict, kind: str, node: int, group: str = "", ttl: float | None = None) -> Message:
    """Make a message of type `kind` to a node, with an id that no other message of this process has."""
    metadata = Metadata(
        run_id=RUN,
        message_id=str(next(_ids)),
        src_node_id=SERVER,
        dst_node_id=node,
        reply_to_message_id="",
        group_id=group,
        created_at=time.time(),
        ttl=DEFAULT_TTL if ttl is None else ttl,
        message_type=kind,
    )
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload, no-any-return]
