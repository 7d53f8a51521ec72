"""Messages as Flower's records and back, checked before they are used, and a transport over any Flower grid.

    codec.py            Codec: instructions and answers as records, and back
    instructions.py     the half that the server writes and a client reads
    answers.py          the half that a client writes and the server reads
    secure.py           the messages of secure aggregation
    arrays.py           vectors as arrays, and selections of their groups
    vector_cache.py     VectorCache: a vector for many clients is encoded once
    validation.py       FieldReader: reads a record and refuses what does not fit
    handshake.py        hello: who a node is, and which blocks are shared
    packing.py          a message's content as one record
    flower_private.py   all that leans on parts of Flower that it does not document
    transport.py        GridTransport: instructions out, answers back
    replies.py          replies one by one, measured before they are decoded
    pending.py          PendingMessages, Backoff: messages without a reply yet
    registry.py         NodeRegistry: which node is which client
    grids.py            what Flower's grids do and mean

Begin with codec.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.engines.wire.codec import Codec, content_size
    from grpo_fed.engines.wire.handshake import (
        HELLO,
        Hello,
        read_hello,
        read_shared_blocks,
        write_hello,
        write_shared_blocks,
    )
    from grpo_fed.engines.wire.instructions import EVALUATE, MEASURE, TRAIN, message_type
    from grpo_fed.engines.wire.validation import InvalidMessageError

__all__ = [
    "EVALUATE",
    "HELLO",
    "MEASURE",
    "TRAIN",
    "Codec",
    "Hello",
    "InvalidMessageError",
    "content_size",
    "message_type",
    "read_hello",
    "read_shared_blocks",
    "write_hello",
    "write_shared_blocks",
]

MODULES = {
    "Codec": "grpo_fed.engines.wire.codec",
    "EVALUATE": "grpo_fed.engines.wire.instructions",
    "HELLO": "grpo_fed.engines.wire.handshake",
    "Hello": "grpo_fed.engines.wire.handshake",
    "InvalidMessageError": "grpo_fed.engines.wire.validation",
    "MEASURE": "grpo_fed.engines.wire.instructions",
    "TRAIN": "grpo_fed.engines.wire.instructions",
    "content_size": "grpo_fed.engines.wire.codec",
    "message_type": "grpo_fed.engines.wire.instructions",
    "read_hello": "grpo_fed.engines.wire.handshake",
    "read_shared_blocks": "grpo_fed.engines.wire.handshake",
    "write_hello": "grpo_fed.engines.wire.handshake",
    "write_shared_blocks": "grpo_fed.engines.wire.handshake",
}

__getattr__ = lazy_getattr(__name__, MODULES)
