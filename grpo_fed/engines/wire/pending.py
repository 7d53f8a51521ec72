"""Messages on one of Flower's own grids that have no reply yet, and how often to ask for replies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

from flwr.app import Message
from flwr.serverapp import Grid

from grpo_fed.engines.wire.grids import copy_with_new_id, push, read_start_times
from grpo_fed.engines.wire.replies import ReplyLimits, pull_replies
from grpo_fed.runs.records import Failure

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two questions for replies: after a question that found some, and at most."""
RESTART_CHECK = 5.0
"""Seconds between two looks at whether nodes were restarted that have not replied."""


@final
class PendingMessages:
    """Messages to clients that have no reply yet, at most one for each client, with the copies that were sent again.

    If a client's node is restarted, its message may be lost with it, and Flower reports no error if the node is back
    before anything was asked of it. So the message is sent again. A client that gets both does the same work for
    either, so that either reply will do; an error counts only if the other message has failed as well.
    """

    def __init__(self, grid: Grid, limits: ReplyLimits) -> None:
        """limits: what a reply may have."""
        self._grid, self._limits = grid, limits
        self._clients: dict[str, str] = {}
        """By message id, the client."""
        self._ids: dict[str, set[str]] = {}
        """By client, the ids of its message and of the copies."""
        self._messages: dict[str, Message] = {}
        """By client, its message."""
        self._started: dict[str, str] = {}
        """By client, when its node was started at the time its message was sent."""
        self._next_check = 0.0
        self.waits = bool(getattr(grid, "waits", False))
        """Whether the grid itself waits for replies, as `flower.superlink_grid.SuperLinkGrid` does."""
        self._waiting: Any = grid

    def __len__(self) -> int:
        """Count the messages and copies without a reply."""
        return len(self._clients)

    def push(self, messages: Mapping[str, Message]) -> Iterator[tuple[str, bool]]:
        """Hand a message over for each client; yield the client and whether the grid took its message."""
        started = read_start_times(self._grid)
        if not self:
            self._next_check = time.monotonic() + RESTART_CHECK
        for client, message_id in push(self._grid, messages):
            if message_id is not None:
                self._add(client, message_id)
                self._messages[client] = messages[client]
                self._started[client] = started.get(messages[client].metadata.dst_node_id, "")
            yield client, message_id is not None

    def pull(self, wait: float) -> Iterator[tuple[str, Message | Failure]]:
        """Ask the grid for replies once; yield each client that has one, with the reply that counts, or why it is none
        that can be read.

        wait: seconds for which a grid that can wait for replies may do so.
        """
        if not self:
            return
        for message_id, reply in pull_replies(self._grid, list(self._clients), self._limits, min(wait, RESTART_CHECK)):
            client = self._resolve(message_id, isinstance(reply, Failure) or reply.has_error())
            if client is not None:
                yield client, reply

    def resend_to_restarted(self) -> list[Message]:
        """Send messages again to nodes that were restarted since, if it is time to look; return the copies."""
        now = time.monotonic()
        if now < self._next_check:
            return []
        self._next_check = now + RESTART_CHECK
        started = read_start_times(self._grid)
        copies: dict[str, Message] = {}
        for client, message in self._messages.items():
            latest = started.get(message.metadata.dst_node_id, "")
            earlier, self._started[client] = self._started[client], latest or self._started[client]
            if earlier and latest > earlier:
                copies[client] = copy_with_new_id(message)
        for client, message_id in push(self._grid, copies):
            if message_id is not None:
                self._add(client, message_id)
        return list(copies.values())

    def _add(self, client: str, message_id: str) -> None:
        self._clients[message_id] = client
        self._ids.setdefault(client, set()).add(message_id)

    def _resolve(self, message_id: str, is_error: bool) -> str | None:
        """Return the client whose message is settled by a reply to it; None if it settles none, or not yet."""
        client = self._clients.pop(message_id, None)
        if client is None:
            return None
        self._ids[client].remove(message_id)
        if is_error and self._ids[client]:
            return None
        self.forget([client])
        return client

    def forget(self, clients: Iterable[str]) -> None:
        """Give up what these clients have not replied to."""
        for client in list(clients):
            self._messages.pop(client, None)
            ids = self._ids.pop(client, set())
            for message_id in ids:
                del self._clients[message_id]
            if self.waits and ids:
                self._waiting.forget(ids)

    def forget_all(self) -> None:
        """Give up all that has no reply yet."""
        self.forget(self._messages)


@final
class Backoff:
    """Chooses how long to wait before the grid is asked again.

    Replies tend to come together, so after one the pause is short. Without, it grows, and is at least four times as
    long as the question took, so that asking takes no more than a fifth of the time.
    """

    def __init__(self) -> None:
        self._pause = SHORTEST_PAUSE

    def pause(self, found: bool, took: float) -> float:
        """Return the seconds to wait, after a question that found a reply or not and took so many seconds."""
        self._pause = SHORTEST_PAUSE if found else min(LONGEST_PAUSE, max(1.5 * self._pause, 4 * took))
        return self._pause
