"""Flower's grids: how messages are handed over to them, and what their errors mean."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

from flwr.app import Error, Message
from flwr.serverapp import Grid

from grpo_fed.engines.wire.flower_private import ObjectPushError
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.toml.text import shorten

CLOCK_ERROR = 300.0
"""Seconds by which a node's clock may be wrong: Flower keeps a message so much longer than we wait for its reply."""
PUSH_SIZE = 100
"""How many messages are pushed in one request, which must not become too large."""
PUSH_TRIES = 3
"""How often messages are pushed before they count as lost, if the SuperLink is killed meanwhile."""
REASON_LENGTH = 300
"""The most characters of a failure's reason."""

RAISED, DIED, LATE = (1, 2, 6, 7), (0, 5, 8), (3, 4)
"""Flower's error codes: the app raised or could not be loaded; the app or its node ended; the message has expired."""

log = logging.getLogger(__name__)


def push(grid: Grid, messages: Mapping[str, Message]) -> Iterator[tuple[str, str | None]]:
    """Hand messages over to a grid; yield each name with its message's id, or None where the grid did not take it."""
    names = list(messages)
    for start in range(0, len(names), PUSH_SIZE):
        batch = {name: messages[name] for name in names[start : start + PUSH_SIZE]}
        taken: set[str] = set()
        for _ in range(PUSH_TRIES):
            try:
                taken = {message_id for message_id in grid.push_messages(list(batch.values())) if message_id}
                break
            except ObjectPushError as error:
                log.warning("%s", to_one_line(str(error)))
                batch = {name: copy_with_new_id(message) for name, message in batch.items()}
        for name, message in batch.items():
            message_id = message.metadata.message_id
            yield name, message_id if message_id in taken else None


def read_start_times(grid: Grid) -> dict[int, str]:
    """Return when each connected node was started, as the grid writes times; empty if the grid does not know."""
    get_nodes = getattr(grid, "get_nodes", None)
    return {} if get_nodes is None else {node.node_id: node.last_activated_at for node in get_nodes()}


def copy_with_new_id(message: Message) -> Message:
    """Copy a message for sending it again, since the SuperLink or the node may still know the old id."""
    metadata = message.metadata
    return Message(
        message.content, metadata.dst_node_id, metadata.message_type, ttl=metadata.ttl, group_id=metadata.group_id
    )


def to_failure(error: Error) -> Failure:
    """Translate Flower's error into why a client has no answer."""
    reason = to_one_line(error.reason or "")
    raised = re.fullmatch(r"<class '(?:.*\.)?(\w+)'>:<'(.*)'>", reason)  # how Flower writes an exception
    if raised:
        reason = f"{raised[1]}: {raised[2]}"
    kind = "raised" if error.code in RAISED else "late" if error.code in LATE else "died"
    return Failure(kind, reason or f"Flower's error {error.code}")


def to_one_line(text: str) -> str:
    """Shorten a text from a client to one line for a log, without characters that would control a terminal."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return shorten(" ".join(printable.split()), REASON_LENGTH)
