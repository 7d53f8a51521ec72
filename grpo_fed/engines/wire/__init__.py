"""Messages as Flower's records and back, checked before they are used, and a transport over any Flower grid.

    codec.py            Codec: instructions and answers as records
    arrays.py           vectors, and parts of them
    validation.py       FieldReader: refuses what does not fit
    handshake.py        hello: who a node is, and which blocks are shared
    packing.py          a message's content as one array
    message_factory.py  messages outside of one of Flower's processes
    transport.py        GridTransport: instructions out, answers back
    registry.py         NodeRegistry: which node is which client
    grids.py            what Flower's grids do and mean

Begin with codec.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.engines.wire.codec import EVALUATE, MEASURE, TRAIN, Codec, content_size, message_type
    from grpo_fed.engines.wire.handshake import (
        HELLO,
        Hello,
        read_hello,
        read_shared_blocks,
        write_hello,
        write_shared_blocks,
    )
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
    "EVALUATE": "grpo_fed.engines.wire.codec",
    "HELLO": "grpo_fed.engines.wire.handshake",
    "Hello": "grpo_fed.engines.wire.handshake",
    "InvalidMessageError": "grpo_fed.engines.wire.validation",
    "MEASURE": "grpo_fed.engines.wire.codec",
    "TRAIN": "grpo_fed.engines.wire.codec",
    "content_size": "grpo_fed.engines.wire.codec",
    "message_type": "grpo_fed.engines.wire.codec",
    "read_hello": "grpo_fed.engines.wire.handshake",
    "read_shared_blocks": "grpo_fed.engines.wire.handshake",
    "write_hello": "grpo_fed.engines.wire.handshake",
    "write_shared_blocks": "grpo_fed.engines.wire.handshake",
}

__getattr__ = lazy_getattr(__name__, MODULES)
