"""A transport over any Flower grid: instructions go out as messages, and replies come back as checked answers.

There are two kinds of grids. Flower's own have to be asked for replies again and again. A grid whose attribute
`streams` is true answers by itself: its `send_and_receive` iterates over the replies in the order of the messages, and
its `create_message` makes messages where Flower's cannot be made.

Clients of a streaming grid know the whole scenario. Those of Flower's own grids each know their own task alone, so
their messages also name and identify the shared blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import final

from flwr.app import Message
from flwr.serverapp import Grid

from grpo_fed.engines import wire
from grpo_fed.engines.wire import Codec, InvalidMessageError
from grpo_fed.engines.wire.grids import CLOCK_ERROR, to_failure, to_one_line
from grpo_fed.engines.wire.handshake import SHARED_BLOCKS, write_own_entry
from grpo_fed.engines.wire.pending import Backoff, PendingMessages
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.engines.wire.replies import ReplyLimits
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario

FOREVER = 10 * 365 * 86_400.0
"""Seconds that a message without a deadline lives; Flower's default is half a day."""


@final
class GridTransport:
    """Reaches a federation's clients as nodes of a grid.

    `send` and `submit` do not know each other's messages: a `send` while submitted instructions have no answer yet
    neither waits for them nor loses them.
    """

    def __init__(
        self,
        grid: Grid,
        shared_blocks: SharedBlocks,
        scenario: Scenario,
        nodes: Mapping[int, str] | NodeRegistry | None = None,
    ) -> None:
        """nodes: the clients' names by node, where they are known; otherwise a registry, by default a new one, asks."""
        self._grid, self._codec, self._clients = grid, Codec(shared_blocks, scenario), shared_blocks.clients
        self._scenario = scenario
        self._streams = bool(getattr(grid, "streams", False))
        self._registry = nodes if isinstance(nodes, NodeRegistry) else NodeRegistry(grid, shared_blocks.clients, nodes)
        self._shared_blocks = None if self._streams else wire.write_shared_blocks(shared_blocks)
        self._nodes: Mapping[str, int] = {}
        """By client, the node that it had when `reachable` was called last."""
        self._bytes_up = self._bytes_down = 0
        self._limits = ReplyLimits.of(shared_blocks)
        self._pending = PendingMessages(grid, self._limits)
        """What was submitted and has no reply yet."""
        self._submitted: dict[str, Instruction] = {}
        self._undelivered: dict[str, Failure] = {}
        """By client, why what was submitted could not be handed over, until it is collected."""

    @property
    def bytes_up(self) -> int:
        return self._bytes_up

    @property
    def bytes_down(self) -> int:
        return self._bytes_down

    @property
    def rejected(self) -> Mapping[int, str]:
        """Why a connected node is no client of this federation, by the node's id."""
        return self._registry.rejected

    def reachable(self) -> tuple[str, ...]:
        """Return the clients that can be sent to now, in the scenario's order.

        This does not wait: a node that has just connected is asked for its name, and counts once it has answered.
        """
        self._nodes = self._registry.connected_clients()
        return tuple(name for name in self._clients if name in self._nodes)

    # All at once

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        """Yield every client's answer, or why there is none, once each and in the order of their names."""
        messages, absent = self._address(instructions, deadline)
        known: dict[str, Answer | Failure] = {**absent}
        replies = self._stream(messages, deadline) if self._streams else self._poll(messages, deadline)
        waiting = deque(sorted(instructions))
        for name, reply in replies:
            known[name] = self._read(instructions[name], reply)
            while waiting and waiting[0] in known:
                first = waiting.popleft()
                yield first, known.pop(first)
        late = Failure("late", "no answer" if deadline is None else f"no answer within {deadline:g} seconds")
        for name in waiting:
            yield name, known.pop(name, late)

    def _stream(self, messages: Mapping[str, Message], deadline: float | None) -> Iterator[tuple[str, Message]]:
        """Yield the replies of a grid that answers by itself."""
        names: dict[str, str] = {}
        for count, reply in enumerate(self._grid.send_and_receive(list(messages.values()), timeout=deadline)):
            if count == 0:  # only now does every message have its id
                names = {message.metadata.message_id: name for name, message in messages.items()}
            name = names.pop(reply.metadata.reply_to_message_id, None)
            if name is not None:
                yield name, reply

    def _poll(self, messages: Mapping[str, Message], deadline: float | None) -> Iterator[tuple[str, Message | Failure]]:
        """Yield the replies of one of Flower's own grids; replies to messages of earlier rounds are never asked for."""
        until = time.monotonic() + (FOREVER if deadline is None else deadline)
        pending, backoff = PendingMessages(self._grid, self._limits), Backoff()
        yield from self._hand_over(pending, messages)
        while pending:
            asked, count = time.monotonic(), len(pending)
            yield from pending.pull(until - asked)
            found = len(pending) < count
            if asked >= until:
                pending.forget_all()
                return
            self._resend(pending)
            pause = 0.0 if pending.waits else backoff.pause(found, time.monotonic() - asked)
            if pending:
                time.sleep(min(pause, until - asked))

    # One by one

    def submit(self, instructions: Mapping[str, Instruction]) -> None:
        """Hand instructions to clients and return; `collect` gives their answers.

        A client's earlier instruction is given up if it was not answered yet.
        """
        messages, absent = self._address(instructions, None)
        self._pending.forget(instructions)
        self._submitted |= instructions
        earlier = {name: failure for name, failure in self._undelivered.items() if name not in instructions}
        self._undelivered = earlier | absent | dict(self._hand_over(self._pending, messages))

    def collect(self, timeout: float) -> list[tuple[str, Answer | Failure]]:
        """Return the answers to submitted instructions that have come since, in the order in which they came.

        If there are none yet, wait for the first, `timeout` seconds at most. A streaming grid answers when it is asked
        for replies, and takes as long as its clients do.
        """
        until, backoff = time.monotonic() + timeout, Backoff()
        answers: list[tuple[str, Answer | Failure]] = list(self._undelivered.items())
        self._undelivered = {}
        while True:
            asked = time.monotonic()
            replies = self._pending.pull(max(0.0, until - asked))
            answers += ((name, self._read(self._submitted.pop(name), reply)) for name, reply in replies)
            if answers or not self._pending or asked >= until:
                return answers
            self._resend(self._pending)
            pause = 0.0 if self._pending.waits else backoff.pause(False, time.monotonic() - asked)
            time.sleep(min(pause, until - asked))

    # Messages

    def _address(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> tuple[dict[str, Message], dict[str, Failure]]:
        """Make a message for each client, in the order of their names; without a node it is a failure instead."""
        names = sorted(instructions)
        if any(name not in self._nodes for name in names):
            self.reachable()
        absent = Failure("unreachable", "no node is connected for it")
        messages = {name: self._message(name, instructions[name], deadline) for name in names if name in self._nodes}
        return messages, {name: absent for name in names if name not in self._nodes}

    def _message(self, name: str, instruction: Instruction, deadline: float | None) -> Message:
        content, kind = self._codec.write_instruction(instruction), wire.message_type(instruction)
        if self._shared_blocks is not None:
            content[SHARED_BLOCKS] = write_own_entry(self._shared_blocks, self._scenario, name)
        self._bytes_down += wire.content_size(content)
        node, group, life = self._nodes[name], str(instruction.start.round), FOREVER if deadline is None else deadline
        if self._streams:
            return self._grid.create_message(content, kind, node, group, life)
        return Message(content, node, kind, group_id=group, ttl=life + CLOCK_ERROR)

    def _hand_over(self, pending: PendingMessages, messages: Mapping[str, Message]) -> Iterable[tuple[str, Failure]]:
        """Push messages to the grid; yield the clients whose messages it did not take."""
        for name, is_taken in pending.push(messages):
            if not is_taken:
                yield name, Failure("unreachable", "the message could not be handed to its node")

    def _resend(self, pending: PendingMessages) -> None:
        self._bytes_down += sum(wire.content_size(message.content) for message in pending.resend_to_restarted())

    def _read(self, instruction: Instruction, reply: Message | Failure) -> Answer | Failure:
        if isinstance(reply, Failure):
            return reply
        if reply.has_error():
            return to_failure(reply.error)
        self._bytes_up += wire.content_size(reply.content)
        try:
            return self._codec.read_answer(instruction, reply.content)
        except InvalidMessageError as error:
            return Failure("refused", to_one_line(str(error)))
