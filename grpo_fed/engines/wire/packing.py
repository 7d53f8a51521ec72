"""A message's content as an array of bytes, to hand it to a process that Flower did not start."""

from __future__ import annotations

import numpy as np
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto


def pack(content: RecordDict) -> np.ndarray:
    """Pack records into [n] uint8."""
    return np.frombuffer(recorddict_to_proto(content).SerializeToString(), np.uint8)


def unpack(array: np.ndarray) -> RecordDict:
    """Unpack what `pack` packed."""
    return recorddict_from_proto(Proto.FromString(array.tobytes()))
