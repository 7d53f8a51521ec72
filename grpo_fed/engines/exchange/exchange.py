"""What a SuperLink keeps in memory: messages that wait for nodes, and answers that wait for a server's app.

Nothing is lost with a connection, a node or the SuperLink, since each side says what it has:

- A message has an id, and asking again by the same id changes nothing.
- A node that waits says which ids it has: those that it works on, and those that it has answered. It gets the first
  other one. So a request may be repeated, and a restarted node, which has nothing, gets what the one before had. It
  keeps an answer until it is told to drop it, and gives it again if a new SuperLink is asked by its id: no client
  trains twice.
- An app that waits for answers says which ones it has read, and only those are forgotten.
- The epoch is another one for each SuperLink process. By it an app finds out that the one before was killed, and asks
  again.

All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

SILENT_SECONDS = 30.0
"""Seconds without a sign of life after which a node counts as gone."""
GONE_SECONDS = 90.0
"""Seconds after which it is left to Flower whether a silent node is online: it may have become one of Flower's own."""
FORGET_SECONDS = 120.0
"""Seconds that a new SuperLink waits for apps to ask again before it tells nodes to drop what it does not know."""
CHECK = 1.0
"""Seconds between two looks for nodes that have fallen silent, while an app waits."""
MOST_BYTES = 4 * 2**30
"""The most bytes of messages and answers that are kept; what is more goes by Flower."""
ANSWERS_BYTES = 64 * 2**20
"""About the most bytes of answers that an app gets at once."""
MOST_ENDED = 100_000
"""How many ids are remembered of messages that are over."""


@dataclass(frozen=True)
class NodeMessage:
    """A message to a node."""

    id: str
    node: int
    kind: str
    content: bytes


@dataclass(frozen=True)
class NodeAnswer:
    """What a node answers to a message: a content, or an error by Flower's code and reason."""

    id: str
    content: bytes | None
    code: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Next:
    """What a node is told."""

    instruction: NodeMessage | None
    run: int
    drop: tuple[str, ...]
    """Ids that the node has and that are over."""
    again: tuple[str, ...]
    """Ids whose answers the node has and has to give again."""
    ask_flower: bool
    """Whether Flower may have a message for the node."""


@dataclass(frozen=True)
class FoundAnswers:
    """What an app is told."""

    answers: tuple[NodeAnswer, ...]
    silent: tuple[str, ...]
    """Ids of messages that were given up, since their nodes have fallen silent."""


@dataclass(frozen=True)
class NodeStatus:
    """What is known of a node."""

    node: int
    client: str
    silent_seconds: float
    working: int
    """How many messages it works on."""
    device: str
    """What its client computes on; empty if the node does not say."""
    version: str
    """Of grpo_fed on its machine; empty if the node does not say."""


@dataclass(eq=False)
class _Message:
    instruction: NodeMessage
    run: int
    answer: NodeAnswer | None = None


@dataclass(eq=False)
class _Node:
    client: str = ""
    device: str = ""
    version: str = ""
    seen: float = 0.0
    working: tuple[str, ...] = ()
    ask_flower: bool = True
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    turn: int = 0
    """The number of its latest request: an earlier one that still waits is that of a lost connection."""


@final
class Exchange:
    """Hands messages from apps to nodes, and answers back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.epoch = secrets.token_hex(8)
        self._clock, self._began = clock, clock()
        self._messages: dict[str, _Message] = {}
        """By id, in the order in which they were asked."""
        self._ended: dict[str, None] = {}
        self._nodes: dict[int, _Node] = {}
        self._answered: dict[int, asyncio.Event] = {}
        """By run."""
        self._bytes = 0

    # For nodes

    def arrive(self, node: int, client: str, device: str = "", version: str = "") -> None:
        """Note a node, its client's name, and what it says of its machine."""
        known = self._nodes.setdefault(node, _Node())
        known.client, known.device, known.version = client, device, version
        known.seen, known.ask_flower = self._clock(), True

    async def next(self, node: int, working: Sequence[str], answered: Sequence[str], wait: float) -> Next:
        """Wait until there is something to tell a node, `wait` seconds at most."""
        known = self._nodes.setdefault(node, _Node())
        known.seen, known.working = self._clock(), tuple(working)
        known.turn += 1
        turn, until = known.turn, self._clock() + wait
        while True:
            known.wake.clear()
            found = self._find_next(node, working, answered)
            rest = until - self._clock()
            is_urgent = found.instruction or found.again or found.ask_flower or set(found.drop) & set(working)
            if is_urgent or rest <= 0 or known.turn != turn:
                known.ask_flower &= known.turn != turn
                return found
            try:
                await asyncio.wait_for(known.wake.wait(), rest)
            except TimeoutError:
                continue

    def answer(self, node: int, answer: NodeAnswer) -> bool:
        """Take a node's answer; return whether its message is known. A second answer changes nothing."""
        known = self._nodes.setdefault(node, _Node())
        known.seen = self._clock()
        known.working = tuple(message_id for message_id in known.working if message_id != answer.id)
        message = self._messages.get(answer.id)
        if message is None or message.instruction.node != node:
            return False
        if message.answer is None:
            message.answer = answer
            self._bytes += len(answer.content or b"")
            self._wake_run(message.run)
        return True

    def _find_next(self, node: int, working: Sequence[str], answered: Sequence[str]) -> Next:
        has, found, run = {*working, *answered}, None, 0
        for message in self._messages.values():
            instruction = message.instruction
            if instruction.node == node and message.answer is None and instruction.id not in has:
                found, run = instruction, message.run
                break
        is_old = self._clock() > self._began + FORGET_SECONDS
        drop = [key for key in has if key in self._ended or (is_old and key not in self._messages)]
        again = [key for key in answered if key in self._messages and self._messages[key].answer is None]
        return Next(found, run, tuple(drop), tuple(again), self._nodes[node].ask_flower)

    # For apps

    def ask(self, run: int, instructions: Iterable[NodeMessage], again: bool = False) -> tuple[str, ...]:
        """Take messages to nodes that are waiting or were a moment ago; return the ids of those that were taken.

        again: whether all of them were taken by a SuperLink before this one, so that their nodes will be back.
        """
        taken = []
        for instruction in instructions:
            known = self._nodes.get(instruction.node)
            if again and known is None:
                known = self._nodes[instruction.node] = _Node(seen=self._clock())
            if instruction.id in self._messages or instruction.id in self._ended:
                taken.append(instruction.id)
            elif known is not None and not (self._is_silent(known) or self._bytes > MOST_BYTES):
                self._messages[instruction.id] = _Message(instruction, run)
                self._bytes += len(instruction.content)
                taken.append(instruction.id)
                known.wake.set()
            elif known is not None:
                known.ask_flower = True
                known.wake.set()
        return tuple(taken)

    def end(self, run: int, ids: Iterable[str]) -> None:
        """Forget messages of a run whose answers were read or are no longer wanted."""
        for message_id in ids:
            message = self._messages.get(message_id)
            if message is not None and message.run == run:
                self._forget(message)

    async def hear(self, run: int, ids: Sequence[str], wait: float) -> FoundAnswers:
        """Wait until there are answers to these messages or their nodes have fallen silent, `wait` seconds at most.

        It does not wait if it does not know all of them: then a SuperLink before this one was asked.
        """
        event = self._answered.setdefault(run, asyncio.Event())
        until = self._clock() + wait
        while True:
            event.clear()
            heard = self._find_answers(run, ids)
            rest = until - self._clock()
            if heard.answers or heard.silent or rest <= 0 or not all(key in self._messages for key in ids):
                return heard
            try:
                await asyncio.wait_for(event.wait(), min(rest, CHECK))
            except TimeoutError:
                continue

    def end_run(self, run: int) -> None:
        """Forget all messages of a run."""
        for message in [message for message in self._messages.values() if message.run == run]:
            self._forget(message)
        self._answered.pop(run, None)

    @property
    def gone(self) -> list[int]:
        """The nodes that have fallen silent and that Flower may still count as online."""
        oldest = self._clock() - GONE_SECONDS
        return [number for number, node in self._nodes.items() if self._is_silent(node) and node.seen > oldest]

    @property
    def runs(self) -> set[int]:
        """The runs that have messages here."""
        return {message.run for message in self._messages.values()}

    @property
    def nodes(self) -> list[NodeStatus]:
        """What is known of each node, by the names of their clients."""
        now = self._clock()
        known = [
            NodeStatus(number, node.client, now - node.seen, len(node.working), node.device, node.version)
            for number, node in self._nodes.items()
        ]
        return sorted(known, key=lambda node: (node.client, node.node))

    def _find_answers(self, run: int, ids: Sequence[str]) -> FoundAnswers:
        answers: list[NodeAnswer] = []
        silent: list[str] = []
        size = 0
        for message_id in ids:
            message = self._messages.get(message_id)
            if message is None or message.run != run:
                continue
            node = self._nodes.get(message.instruction.node)
            if message.answer is not None:
                size += len(message.answer.content or b"")
                if size <= ANSWERS_BYTES or not answers:
                    answers.append(message.answer)
            elif node is None or self._is_silent(node):
                silent.append(message_id)
        for message_id in silent:
            self._forget(self._messages[message_id])
        return FoundAnswers(tuple(answers), tuple(silent))

    def _is_silent(self, node: _Node) -> bool:
        return self._clock() > node.seen + SILENT_SECONDS

    def _forget(self, message: _Message) -> None:
        instruction, answer = message.instruction, message.answer
        del self._messages[instruction.id]
        self._bytes -= len(instruction.content) + len((answer.content if answer else None) or b"")
        self._ended[instruction.id] = None
        while len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]
        node = self._nodes.get(instruction.node)
        if node is not None and answer is None:
            node.wake.set()

    def _wake_run(self, run: int) -> None:
        if run in self._answered:
            self._answered[run].set()
