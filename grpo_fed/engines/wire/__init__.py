"""What travels between server and clients: typed records as Flower's and back, checked before they are used."""

from __future__ import annotations

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
