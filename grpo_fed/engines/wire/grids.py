"""Flower's grids: how messages are handed to one, and what it means by an error."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from grpo_fed.runs.records import Failure
from grpo_fed.scenario.toml.text import shorten

if TYPE_CHECKING:
    pass


CLOCKS = 300.0
"""Seconds that a node's clock may be wrong: to Flower a message lives so much longer than to us."""
PUSHED = 100
"""Messages that are pushed at once; a request must not be too large."""
TRIES = 3
"""How often they are pushed where the SuperLink is killed in the midst of it."""
LINE = 300
"""Letters of a reason."""

RAISED, DIED, LATE = (1, 2, 6, 7), (0, 5, 8), (3, 4)
"""Flower's error codes: the app raised, or could not be loaded; it or its node is gone; the message has expired."""

log = logging.getLogger(__name__)


def push(grid: Grid, messages: Mapping[str, Message]) -> Iterator[tuple[str, str | None]]:
    """Each message's id, or None for what the grid did not take."""
    names = list(messages)
    for start in range(0, len(names), PUSHED):
        some = {name: messages[name] for name in names[start : start + PUSHED]}
        taken: set[str] = set()
        for _ in range(TRIES):
            try:
                taken = {one for one in grid.push_messages(list(some.values())) if one}
                break
            except ObjectPushError as error:
                log.warning("%s", one_line(str(error)))
                some = {name: copy_with_new_id(message) for name, message in some.items()}
        for name, message in some.items():
            message_id = message.metadata.message_id
            yield name, message_id if message_id in taken else None


def node_start_times(grid: Grid) -> dict[int, str]:
    """By node that is there, when it was started, as the grid has it; of a grid that does not say, of none."""
    look = getattr(grid, "get_nodes", None)
    return {} if look is None else {node.node_id: node.last_activated_at for node in look()}


def copy_with_new_id(message: Message) -> Message:
    """The same with an id of its own, for a SuperLink that was killed when it had half of it, or a node that had it."""
    told = message.metadata
    return Message(message.content, told.dst_node_id, told.message_type, ttl=told.ttl, group_id=told.group_id)


def failure_of(error: Error) -> Failure:
    """What Flower says of a client that has no answer."""
    reason = one_line(error.reason or "")
    raised = re.fullmatch(r"<class '(?:.*\.)?(\w+)'>:<'(.*)'>", reason)  # how Flower writes an exception
    if raised:
        if raised[1] == WorkerDiedError.__name__:
            return Failure("died", raised[2])
        reason = f"{raised[1]}: {raised[2]}"
    kind = "raised" if error.code in RAISED else "late" if error.code in LATE else "died"
    return Failure(kind, reason or f"Flower's error {error.code}")


def one_line(text: str) -> str:
    """On one line, not too long for a log, and without what a terminal would follow: a client may say anything."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shorten(" ".join(shown.split()), LINE)


class WorkerDiedError(RuntimeError):
    """The process that did the work has ended; says how."""
