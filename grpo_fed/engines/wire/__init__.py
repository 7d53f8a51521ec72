"""What travels between server and clients: typed records as Flower's and back, checked before they are used."""

from __future__ import annotations

from grpo_fed.engines.wire.codec import EVALUATE, MEASURE, TRAIN, Wire, kind_of, size_of
from grpo_fed.engines.wire.handshake import HELLO, Hello, read_blocks, read_hello, write_commons, write_hello
from grpo_fed.engines.wire.validation import Refused

__all__ = [
    "EVALUATE",
    "HELLO",
    "MEASURE",
    "TRAIN",
    "Hello",
    "Refused",
    "Wire",
    "kind_of",
    "read_blocks",
    "read_hello",
    "size_of",
    "write_commons",
    "write_hello",
]
