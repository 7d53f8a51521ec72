"""The round loop's post over any Flower grid: instructions go out as messages, and replies come back as answers.

Flower's own grids are asked for replies again and again until the deadline. A grid whose attribute `streams` is true
answers at once: its `send_and_receive` is an iterator over the replies, in the order of the messages, and its own
`create_message` makes them.

Who makes messages in processes of their own knows of no other client: those of Flower's grids are told with each
instruction what all clients share.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import final

from flwr.app import Message
from flwr.serverapp import Grid

from grpo_fed.engines import wire
from grpo_fed.engines.wire import Codec, InvalidMessageError
from grpo_fed.engines.wire.grids import CLOCKS, copy_with_new_id, failure_of, node_start_times, one_line, push
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario

FOREVER = 10 * 365 * 86_400.0
"""Seconds that a message without a deadline may take; Flower's default is half a day."""
QUICK, SLOW = 0.05, 1.0
"""Seconds between two questions for replies: after one that found some, and at most."""
AGAIN = 5.0
"""Seconds between two looks at whether nodes that are waited for were started anew."""


@final
class GridTransport:
    """A federation's clients, as nodes of a grid."""

    def __init__(
        self,
        grid: Grid,
        commons: SharedBlocks,
        scenario: Scenario,
        nodes: Mapping[int, str] | NodeRegistry | None = None,
    ) -> None:
        """`nodes` are the clients' names, where they are known; otherwise every node is asked, perhaps by a roll that
        has begun to.
        """
        self._grid, self._codec, self._clients = grid, Codec(commons, scenario), commons.clients
        self._streams = bool(getattr(grid, "streams", False))
        self._registry = nodes if isinstance(nodes, NodeRegistry) else NodeRegistry(grid, commons.clients, nodes)
        self._told = None if self._streams else wire.write_shared_blocks(commons)
        self._where: Mapping[str, int] = {}
        self._up = self._down = 0

    @property
    def bytes_up(self) -> int:
        return self._up

    @property
    def bytes_down(self) -> int:
        return self._down

    @property
    def rejected(self) -> Mapping[int, str]:
        """Why a node that is there is no client of this federation, by the node's id."""
        return self._registry.rejected

    def reachable(self) -> tuple[str, ...]:
        """The clients that can be sent to now, in the scenario's order.

        It waits for nobody: whoever has just come is asked for its name, and counts as soon as it has answered.
        """
        self._where = self._registry.connected_clients()
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
        content, kind = self._codec.write_instruction(instruction), wire.message_type(instruction)
        if self._told is not None:
            content["commons"] = self._told
        self._down += wire.content_size(content)
        node, group, life = self._where[name], str(instruction.start.round), FOREVER if deadline is None else deadline
        if self._streams:
            return self._grid.create_message(content, kind, node, group, life)
        return Message(content, node, kind, group_id=group, ttl=life + CLOCKS)

    def _read(self, instruction: Instruction, reply: Message) -> Answer | Failure:
        if reply.has_error():
            return failure_of(reply.error)
        self._up += wire.content_size(reply.content)
        try:
            return self._codec.read_answer(instruction, reply.content)
        except InvalidMessageError as error:
            return Failure("refused", one_line(str(error)))

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
        began, started, asked = time.monotonic(), node_start_times(self._grid), {}
        for name, message_id in push(self._grid, messages):
            if message_id is None:
                yield name, Failure("unreachable", "the message could not be handed to its node")
            else:
                asked[message_id] = name
        pause, look = QUICK, began + AGAIN
        while asked:
            left = FOREVER if deadline is None else began + deadline - time.monotonic()
            looked = time.monotonic()
            found = 0
            for reply in self._grid.pull_messages(list(asked)):
                name = asked.get(reply.metadata.reply_to_message_id, "")
                if not name:
                    continue
                found += 1
                del asked[reply.metadata.reply_to_message_id]
                if reply.has_error() and name in asked.values():
                    continue  # told twice, it may answer the other one yet
                asked = {one: other for one, other in asked.items() if other != name}
                yield name, reply
            if left <= 0:
                return
            if looked > look:
                look = looked + AGAIN
                asked |= self._resend_to_restarted(messages, asked, started)
            took = time.monotonic() - looked
            pause = QUICK if found else min(SLOW, max(1.5 * pause, 4 * took))
            if asked:
                time.sleep(min(pause, left))

    def _resend_to_restarted(
        self, messages: Mapping[str, Message], asked: Mapping[str, str], started: dict[int, str]
    ) -> dict[str, str]:
        """By the new messages' ids, the clients whose nodes were started since `started`.

        What such a node was told before may be lost with it, and Flower says nothing of that if it is back before
        anybody has asked. Told twice, a client comes to the same.
        """
        now = node_start_times(self._grid)
        names = {name for name in asked.values() if now.get(self._where[name], "") > started.get(self._where[name], "")}
        started |= now
        again = {name: copy_with_new_id(messages[name]) for name in names}
        self._down += sum(wire.content_size(message.content) for message in again.values())
        return {message_id: name for name, message_id in push(self._grid, again) if message_id is not None}
