"""A Flower grid in this process, for tests of what uses a grid and of what answers its messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import count

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[Message], RecordDict | Error | None]
"""What a node replies to a message; None if it has not replied yet."""


def enter_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process was given a task of a run: in no other does Flower make messages."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class InMemoryGrid(Grid):
    """A grid in this process. A message is read when its reply is asked for, by the client of its node."""

    def __init__(self, clients: Mapping[int, Client], streams: bool = False) -> None:
        """clients: by node. streams: whether `send_and_receive` answers by itself, as a local grid's does."""
        self.clients = dict(clients)
        self.streams = streams
        self.sent: dict[str, Message] = {}
        """By id, the messages that have no reply yet."""
        self.pulls = 0
        """How often replies were asked for."""
        self.order: Callable[[list[Message]], list[Message]] = list
        """Rearranges the replies to one question."""
        self._numbers = count(1)

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = f"message-{next(self._numbers)}"
            self.sent[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        return self.order([reply for message_id in message_ids if (reply := self.reply_to(message_id))])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for message_id in self.push_messages(messages):
            reply = self.reply_to(message_id)
            if reply is not None:
                yield reply

    def reply_to(self, message_id: str) -> Message | None:
        message = self.sent[message_id]
        content = self.clients[message.metadata.dst_node_id](message)
        if content is None:
            return None
        del self.sent[message_id]
        return Message(content, reply_to=message)


class GridWithStartTimes(InMemoryGrid):
    """A grid that knows when its nodes were started."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        super().__init__(clients)
        self.started = dict.fromkeys(clients, "2026-01-01T00:00:00")

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, last_activated_at=time) for node, time in self.started.items()]
