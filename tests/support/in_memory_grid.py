"""A Flower grid in this process, for tests of what lies above and below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import count

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[Message], RecordDict | Error | None]
"""What a node does with a message; None says nothing."""


def enter_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had been given a task of a run: Flower's messages can be made in no other."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Village(Grid):
    """A grid in this process. A message is read when its reply is asked for, by the client of its node."""

    def __init__(self, clients: Mapping[int, Client], streams: bool = False) -> None:
        self.clients = dict(clients)
        self.streams = streams
        self.sent: dict[str, Message] = {}
        self.pulls = 0
        self.order: Callable[[list[Message]], list[Message]] = list
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
            message.metadata.__dict__["_message_id"] = name = f"message-{next(self._numbers)}"
            self.sent[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        return self.order([reply for one in message_ids if (reply := self.reply_to(one))])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for name in self.push_messages(messages):
            reply = self.reply_to(name)
            if reply is not None:
                yield reply

    def reply_to(self, name: str) -> Message | None:
        message = self.sent[name]
        said = self.clients[message.metadata.dst_node_id](message)
        if said is None:
            return None
        del self.sent[name]
        return Message(said, reply_to=message)
