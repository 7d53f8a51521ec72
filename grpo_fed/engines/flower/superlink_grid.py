"""The grid of a server's app on a SuperLink: by its exchange where there is one, else by Flower.

By the exchange, messages are one request, in which each content is sent once, and answers are waited for. Messages to
nodes that do not wait at the exchange go by Flower, as does everything on a SuperLink without one.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.wire import InvalidMessageError
from grpo_fed.engines.wire.flower_private import (
    AppConnection,
    DecodeError,
    NoConnectionError,
    NodeInfo,
    NoRouteError,
    ObjectPushError,
    RefusedError,
    Run,
    make_reply,
    set_message_id,
    shorten_backoffs,
    unpack,
)
from grpo_fed.engines.wire.grids import PUSH_TRIES, copy_with_new_id, to_one_line
from grpo_fed.engines.wire.packing import is_packed, pack_into_record, unpack_from_record, unwrap
from grpo_fed.engines.wire.replies import ReplyLimits, pull_replies
from grpo_fed.runs.records import Failure

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds before a request is tried again that found no SuperLink; the pause doubles up to the longest."""
PATIENCE = 600.0
"""Seconds for which a SuperLink may be away."""
FLOWER_WAIT = 0.5
"""The most seconds to wait at the exchange while there are messages that went by Flower."""
SHARE = 4.0
"""A pause is at least so many times as long as the question took."""
NO_LIMITS = ReplyLimits(1 << 62, 1 << 62)
"""The limits of what is asked for through Flower's own interface."""
DIED = 5
"""Flower's error code for a node that has gone."""

log = logging.getLogger(__name__)


@final
class SuperLinkGrid(Grid):
    """Sends messages and brings replies.

    Its `pull_messages` waits until there is a reply, for as long as `wait` says.
    """

    waits = True

    def __init__(self, grid: Grid) -> None:
        """grid: Flower's."""
        shorten_backoffs()
        self._grid, self._connection = grid, AppConnection(grid)
        self._has_exchange = True
        self._sent: dict[str, Message] = {}
        """By id, the messages at the exchange whose replies were not read."""
        self._end: list[str] = []
        """Ids of messages that the exchange may forget."""
        self._epoch = ""
        self._residents: set[int] = set()
        """The nodes that were at the exchange when they were sent a message last."""
        self._by_flower = True
        """Whether any of the latest messages went by Flower."""

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are online; Flower may still count some that the exchange misses."""
        answer = self._request(protocol.HEAR, {"ids": [], "wait": 0.0}) if self._has_exchange else None
        gone = set() if answer is None else {*answer[0]["gone"]}
        return [node for node in self._grid.get_node_ids() if node not in gone]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return what Flower knows of the nodes that are online, if any message went by Flower."""
        return self._grid.get_nodes() if self._by_flower else []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, and return their ids."""
        originals = list(messages)
        packed = [_pack(message) for message in originals]
        ids = [secrets.token_hex(16) for _ in originals]
        taken = self._ask(dict(zip(ids, packed, strict=True)))
        rest = [place for place, message_id in enumerate(ids) if message_id not in taken]
        self._by_flower = bool(rest)
        if rest:
            pushed = self._push_by_flower([packed[place] for place in rest])
            for place, message in zip(rest, pushed, strict=True):
                packed[place] = message
                ids[place] = message.metadata.message_id
        for original, message, message_id in zip(originals, packed, ids, strict=True):
            set_message_id(original, message_id if message_id in taken else message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str], wait: float = 0.0) -> Iterable[Message]:
        """Return the replies that have come to messages with these ids; without any, wait for the first."""
        replies = self.pull_replies(message_ids, NO_LIMITS, wait)
        return [reply for _, reply in replies if isinstance(reply, Message)]

    def pull_replies(
        self, message_ids: Iterable[str], limits: ReplyLimits, wait: float = 0.0
    ) -> list[tuple[str, Message | Failure]]:
        """Return the replies that have come, with the ids of their messages; without any, wait for the first.

        A reply that is larger than the limits or cannot be decoded is a failure.
        """
        wanted = list(message_ids)
        here, by_flower = [key for key in wanted if key in self._sent], [key for key in wanted if key not in self._sent]
        until, pause = time.monotonic() + wait, FIRST_PAUSE
        while True:
            rest = max(0.0, until - time.monotonic())
            replies: list[tuple[str, Message | Failure]] = []
            if here:
                replies += self._hear(here, limits, min(rest, FLOWER_WAIT if by_flower else protocol.WAIT))
            if by_flower:
                began = time.monotonic()
                replies += [(key, _unpack(reply)) for key, reply in pull_replies(self._grid, by_flower, limits)]
                pause = max(pause, min(SHARE * (time.monotonic() - began), LONGEST_PAUSE))
            if replies or time.monotonic() >= until:
                return replies
            if not here:
                time.sleep(min(pause, max(0.0, until - time.monotonic())))
                pause = min(1.5 * pause, LONGEST_PAUSE)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Give up messages: nodes that work on them end that when they get their next message."""
        for message_id in message_ids:
            if self._sent.pop(message_id, None) is not None:
                self._end.append(message_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies."""
        ids, replies = list(self.push_messages(messages)), list[Message]()
        until = time.monotonic() + (protocol.WAIT * 1e9 if timeout is None else timeout)
        while ids and (rest := until - time.monotonic()) > 0:
            found = list(self.pull_messages(ids, rest))
            replies += found
            heard = {reply.metadata.reply_to_message_id for reply in found}
            ids = [message_id for message_id in ids if message_id not in heard]
        return replies

    def _push_by_flower(self, messages: Sequence[Message]) -> list[Message]:
        """Push messages to Flower, and return them; those that it does not take have no id."""
        batch = list(messages)
        taken: set[str] = set()
        for _ in range(PUSH_TRIES):
            try:
                taken = {message_id for message_id in self._grid.push_messages(batch) if message_id}
                break
            except ObjectPushError as error:
                log.warning("%s", to_one_line(str(error)))
                batch = [copy_with_new_id(message) for message in batch]
        for message in batch:
            if message.metadata.message_id not in taken:
                set_message_id(message, "")
        return batch

    # The exchange

    def _ask(self, messages: Mapping[str, Message], again: bool = False) -> set[str]:
        """Hand packed messages to the exchange; return the ids of those that it took."""
        if not messages or not self._has_exchange:
            return set()
        contents: dict[bytes, int] = {}
        heads: list[dict[str, Any]] = []
        for message_id, message in messages.items():
            metadata = message.metadata
            content = contents.setdefault(unwrap(message.content).tobytes(), len(contents))
            heads.append(
                {"id": message_id, "node": metadata.dst_node_id, "kind": metadata.message_type, "content": content}
            )
        before = self._epoch
        answer = self._request(protocol.ASK, {"messages": heads, "again": again}, list(contents))
        if answer is None:
            return set()
        taken = {*answer[0]["taken"]}
        rest = {key: message for key, message in messages.items() if key not in taken}
        if before not in ("", self._epoch) and not again:
            back = {key: message for key, message in rest.items() if message.metadata.dst_node_id in self._residents}
            taken |= self._ask(back, again=True)  # they were at the SuperLink before this one, and will be back
        for message_id, message in messages.items():
            if message_id in taken:
                self._residents.add(message.metadata.dst_node_id)
                self._sent[message_id] = message
            else:
                self._residents.discard(message.metadata.dst_node_id)
        return taken

    def _hear(self, ids: Sequence[str], limits: ReplyLimits, wait: float) -> list[tuple[str, Message | Failure]]:
        """Wait for answers at the exchange."""
        answer = self._request(protocol.HEAR, {"ids": ids, "wait": wait})
        if answer is None:
            return []
        document, contents = answer
        parts, replies = iter(contents), list[tuple[str, Message | Failure]]()
        for entry in document["answers"]:
            content, key = next(parts) if entry["has_content"] else None, str(entry["id"])
            if content is not None and len(content) > limits.total:
                self._sent.pop(key, None)
                self._end.append(key)
                replies.append((key, Failure("refused", f"its reply has more than {limits.total:,} bytes")))
                continue
            replies += [(key, reply) for reply in self._read(key, content, Error(entry["code"], entry["reason"]))]
        for key in map(str, document["silent"]):
            error = Error(DIED, "its node has given no sign of life for 30 seconds")
            replies += [(key, reply) for reply in self._read(key, None, error)]
        return replies

    def _read(self, message_id: str, content: bytes | None, error: Error) -> list[Message]:
        """Make the reply that is read now; none if it was read before."""
        message = self._sent.pop(message_id, None)
        self._end.append(message_id)
        if message is None:
            return []
        if content is None:
            return [make_reply(message_id, message, error)]
        try:
            return [make_reply(message_id, message, unpack(np.frombuffer(content, np.uint8)))]
        except (DecodeError, ValueError, TypeError):
            return [make_reply(message_id, message, RecordDict())]  # which is refused

    def _request(
        self, path: str, document: Mapping[str, Any], contents: Sequence[bytes] = ()
    ) -> tuple[dict[str, Any], list[bytes]] | None:
        """Send a request until a SuperLink answers; None if it has no exchange, or if it is a new one.

        A new SuperLink is asked everything again that the one before had taken.
        """
        end, pause, until = list(self._end), FIRST_PAUSE, time.monotonic() + PATIENCE
        body, answer = protocol.encode({**document, "end": end}, contents), b""
        while not answer:
            try:
                answer = self._connection.request(path, body, protocol.WAIT + protocol.MARGIN)
            except NoRouteError:
                log.info("this SuperLink has no exchange: all messages go by Flower")
                self._has_exchange = False
                return None
            except NoConnectionError as error:
                if time.monotonic() > until:
                    raise
                log.warning("no SuperLink, trying again: %s", error)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except RefusedError:
                list(self._grid.get_node_ids())  # if the run was stopped, this raises what Flower raises
                raise
        del self._end[: len(end)]
        decoded = protocol.decode(answer)
        before, self._epoch = self._epoch, decoded[0]["epoch"]
        if before not in ("", self._epoch):
            log.warning("the SuperLink was restarted: %d messages are sent again", len(self._sent))
            self._ask(dict(self._sent), again=True)
        return decoded


def _pack(message: Message) -> Message:
    metadata, content = message.metadata, pack_into_record(message.content)
    kind, group = metadata.message_type, metadata.group_id
    return Message(content, metadata.dst_node_id, kind, ttl=metadata.ttl, group_id=group)


def _unpack(reply: Message | Failure) -> Message | Failure:
    """Unpack a reply's content; one that cannot be unpacked is left to be refused."""
    if isinstance(reply, Failure):
        return reply
    if reply.has_content() and is_packed(reply.content):
        try:
            reply.content = unpack_from_record(reply.content)
        except (InvalidMessageError, DecodeError, ValueError):
            return reply
    return reply
