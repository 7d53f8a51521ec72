"""The round loop's post over any Flower grid: instructions go out as messages, and replies come back as answers.

Flower's own grids are asked for replies again and again until the deadline. A grid whose attribute `streams` is true
answers at once: its `send_and_receive` is an iterator over the replies, in the order of the messages, and its own
`create_message` makes them.

Nodes say themselves whose they are, when they are first seen. A node that comes back under another id is asked anew;
while both ids are there, the one that said so first is the client.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import final

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from grpo_fed import wire, words
from grpo_fed.commons import Commons
from grpo_fed.messages import Answer, Failure, Instruction
from grpo_fed.scenario import Scenario
from grpo_fed.wire import Refused, Wire

FOREVER = 10 * 365 * 86_400.0
"""Seconds that a message without a deadline may take; Flower's default is half a day."""
CLOCKS = 300.0
"""Seconds that a node's clock may be wrong: to Flower a message lives so much longer than to us."""
PUSHED = 100
"""Messages that are pushed at once; a request must not be too large."""
TRIES = 3
"""How often they are pushed where the SuperLink is killed in the midst of it."""
QUICK, SLOW = 0.05, 1.0
"""Seconds between two questions for replies: after one that found some, and at most."""
HELLO = 60.0
"""Seconds that a node may take to say whose it is, before it is asked again."""
CALM = 10.0
"""Seconds before a node is asked again that failed to say it."""
LINE = 300
"""Letters of a reason."""

RAISED, DIED, LATE = (1, 2, 6, 7), (0, 5, 8), (3, 4)
"""Flower's error codes: the app raised, or could not be loaded; it or its node is gone; the message has expired."""

log = logging.getLogger(__name__)


@final
class GridPost:
    """A federation's clients, as nodes of a grid."""

    def __init__(
        self, grid: Grid, commons: Commons, scenario: Scenario, nodes: Mapping[int, str] | None = None
    ) -> None:
        """`nodes` are the clients' names, where they are known; otherwise every node is asked."""
        self._grid, self._wire, self._clients = grid, Wire(commons, scenario), commons.clients
        self._streams = bool(getattr(grid, "streams", False))
        self._roll = _Roll(grid, commons.clients, nodes)
        self._where: Mapping[str, int] = {}
        self._up = self._down = 0

    @property
    def up(self) -> int:
        return self._up

    @property
    def down(self) -> int:
        return self._down

    @property
    def turned_away(self) -> Mapping[int, str]:
        """Why a node that is there is no client of this federation, by the node's id."""
        return self._roll.turned_away

    def reachable(self) -> tuple[str, ...]:
        """The clients that can be sent to now, in the scenario's order.

        It waits for nobody: whoever has just come is asked for its name, and counts as soon as it has answered.
        """
        self._where = self._roll.call()
        return tuple(name for name in self._clients if name in self._where)

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        """Every client's answer, or why there is none, once each and in the order of their names."""
        names = sorted(instructions)
        if any(name not in self._where for name in names):
            self.reachable()
        known: dict[str, Answer | Failure] = {
            name: Failure("unreachable", "no node is connected for it") for name in names if name not in self._where
        }
        messages = {name: self._message(name, instructions[name], deadline) for name in names if name in self._where}
        waiting = deque(names)
        replies = self._stream(messages, deadline) if self._streams else self._poll(messages, deadline)
        for name, reply in replies:
            known[name] = reply if isinstance(reply, Failure) else self._read(instructions[name], reply)
            while waiting and waiting[0] in known:
                first = waiting.popleft()
                yield first, known.pop(first)
        late = Failure("late", "no answer" if deadline is None else f"no answer within {deadline:g} seconds")
        for name in waiting:
            yield name, known.pop(name, late)

    def _message(self, name: str, instruction: Instruction, deadline: float | None) -> Message:
        content, kind = self._wire.write_instruction(instruction), wire.kind_of(instruction)
        self._down += wire.size_of(content)
        node, group, life = self._where[name], str(instruction.start.round), FOREVER if deadline is None else deadline
        if self._streams:
            return self._grid.create_message(content, kind, node, group, life)
        return Message(content, node, kind, group_id=group, ttl=life + CLOCKS)

    def _read(self, instruction: Instruction, reply: Message) -> Answer | Failure:
        if reply.has_error():
            return _failure(reply.error)
        self._up += wire.size_of(reply.content)
        try:
            return self._wire.read_answer(instruction, reply.content)
        except Refused as error:
            return Failure("refused", _line(str(error)))

    def _stream(self, messages: Mapping[str, Message], deadline: float | None) -> Iterator[tuple[str, Message]]:
        """From a grid that answers at once."""
        asked: dict[str, str] = {}
        for number, reply in enumerate(self._grid.send_and_receive(list(messages.values()), timeout=deadline)):
            if not number:  # only now does every message have its id
                asked = {message.metadata.message_id: name for name, message in messages.items()}
            name = asked.pop(reply.metadata.reply_to_message_id, None)
            if name is not None:
                yield name, reply

    def _poll(self, messages: Mapping[str, Message], deadline: float | None) -> Iterator[tuple[str, Message | Failure]]:
        """From Flower's own grids. What comes for messages of another time is never asked for."""
        began, asked = time.monotonic(), {}
        for name, message_id in _push(self._grid, messages):
            if message_id is None:
                yield name, Failure("unreachable", "the message could not be handed to its node")
            else:
                asked[message_id] = name
        pause = QUICK
        while asked:
            left = FOREVER if deadline is None else began + deadline - time.monotonic()
            looked = time.monotonic()
            found = 0
            for reply in self._grid.pull_messages(list(asked)):
                name = asked.pop(reply.metadata.reply_to_message_id, "")
                if name:
                    found += 1
                    yield name, reply
            if left <= 0:
                return
            took = time.monotonic() - looked
            pause = QUICK if found else min(SLOW, max(1.5 * pause, 4 * took))
            if asked:
                time.sleep(min(pause, left))


@final
class _Roll:
    """Which node is which client."""

    def __init__(self, grid: Grid, clients: Iterable[str], nodes: Mapping[int, str] | None) -> None:
        self._grid, self._clients = grid, frozenset(clients)
        self._asks = nodes is None
        self._names = dict(nodes or {})
        """Of nodes, in the order in which they said them."""
        self._asked: dict[str, tuple[int, float]] = {}
        """By message: the node, and until when its answer counts."""
        self._resting: dict[int, float] = {}
        """Nodes that failed to answer, and until when they are left alone."""
        self.turned_away: dict[int, str] = {}

    def call(self) -> dict[str, int]:
        """Those that are there, by the client's name."""
        there = dict.fromkeys(self._grid.get_node_ids())
        if self._asks:
            self._listen()
            self._ask(there)
            self._listen()
        self.turned_away = {node: why for node, why in self.turned_away.items() if node in there}
        found: dict[str, int] = {}
        for node, name in self._names.items():
            if node not in there or name not in self._clients:
                continue
            first = found.setdefault(name, node)
            if first == node:
                self.turned_away.pop(node, None)
            else:
                self._turn_away(node, f"says that it is {name}, as node {first} does, which came before it")
        return found

    def _ask(self, there: Iterable[int]) -> None:
        """Those that nobody has asked yet, or that have not answered in time."""
        now = time.monotonic()
        self._asked = {one: (node, until) for one, (node, until) in self._asked.items() if until > now}
        self._resting = {node: until for node, until in self._resting.items() if until > now}
        settled = {node for node, _ in self._asked.values()} | self._resting.keys() | self._names.keys()
        strangers = [node for node in there if node not in settled]
        messages = {
            str(node): Message(RecordDict(), node, wire.HELLO, group_id="hello", ttl=HELLO + CLOCKS)
            for node in strangers
        }
        for name, message_id in _push(self._grid, messages):
            if message_id is not None:
                self._asked[message_id] = int(name), now + HELLO

    def _listen(self) -> None:
        """Write down who has answered."""
        if not self._asked:
            return
        for reply in self._grid.pull_messages(list(self._asked)):
            node, _ = self._asked.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is None:
                continue
            try:
                if reply.has_error():
                    raise Refused(_failure(reply.error).reason)
                name = wire.read_hello(reply.content)
            except Refused as error:
                self._resting[node] = time.monotonic() + CALM
                self._turn_away(node, f"did not say whose it is: {_line(str(error))}")
                continue
            self._names[node] = name
            if name not in self._clients:
                close = words.did_you_mean(words.nearest(name, self._clients))
                self._turn_away(node, f"says that it is {_line(name)}, and the scenario has no such client{close}")

    def _turn_away(self, node: int, why: str) -> None:
        if self.turned_away.get(node) != why:
            self.turned_away[node] = why
            log.warning("node %d %s", node, why)


def _push(grid: Grid, messages: Mapping[str, Message]) -> Iterator[tuple[str, str | None]]:
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
                log.warning("%s", _line(str(error)))
                some = {name: _anew(message) for name, message in some.items()}
        for name, message in some.items():
            message_id = message.metadata.message_id
            yield name, message_id if message_id in taken else None


def _anew(message: Message) -> Message:
    """The same with an id of its own, for a SuperLink that was killed when it had only half of the first."""
    told = message.metadata
    return Message(message.content, told.dst_node_id, told.message_type, ttl=told.ttl, group_id=told.group_id)


def _failure(error: Error) -> Failure:
    """What Flower says of a client that has no answer."""
    reason = _line(error.reason or "")
    raised = re.fullmatch(r"<class '(?:.*\.)?(\w+)'>:<'(.*)'>", reason)  # how Flower writes an exception
    if raised:
        reason = f"{raised[1]}: {raised[2]}"
    kind = "raised" if error.code in RAISED else "late" if error.code in LATE else "died"
    return Failure(kind, reason or f"Flower's error {error.code}")


def _line(text: str) -> str:
    """On one line, not too long for a log, and without what a terminal would follow: a client may say anything."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return words.shorten(" ".join(shown.split()), LINE)
