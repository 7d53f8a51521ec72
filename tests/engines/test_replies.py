"""Replies are taken one by one: one that is too large or cannot be decoded is refused, and costs no other."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from grpo_fed.engines.wire import replies
from grpo_fed.engines.wire.replies import ReplyLimits, pull_replies
from grpo_fed.runs.records import Failure
from tests.support.grid_federation import ALL_ANSWERS, SHARED_BLOCKS, make_grid, make_transport, mean_step, train
from tests.support.in_memory_grid import InMemoryGrid, enter_run

LIMITS = ReplyLimits.of(SHARED_BLOCKS)
Objects = dict[str, bytes]


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


@dataclass
class FakeSuperLink:
    """Holds the replies to messages as objects, as a SuperLink does."""

    replies: dict[str, tuple[Message, ObjectTree]] = field(default_factory=dict)
    objects: Objects = field(default_factory=dict)
    confirmed: list[str] = field(default_factory=list)

    def add(self, message_id: str, content: RecordDict, change: Callable[[Objects, ObjectTree], None]) -> None:
        """Store a reply; change: damages its objects by their ids, and their tree."""
        message = Message(RecordDict(), 7, "train")
        message.metadata.__dict__["_message_id"] = message_id
        reply = Message(content, reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        tree = get_object_tree(reply)
        change(objects, tree)
        self.objects |= objects
        self.replies[message_id] = reply, tree

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        found = [self.replies.pop(each) for each in request.message_ids if each in self.replies]
        return PullAppMessagesResponse(
            messages_list=[self._head(reply) for reply, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def _head(self, reply: Message) -> Any:
        proto = message_to_proto(reply)
        proto.ClearField("content")
        return proto

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        content = self.objects.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:
        self.confirmed.append(request.message_object_id)


class FakeHttpGrid(HttpGrid):
    """Flower's own grid, with a SuperLink in this process."""

    def __init__(self, link: FakeSuperLink) -> None:
        super().__init__(token="t")
        self.link = link
        self.set_run(Run.create_empty(1))

    @property
    def _runtime_client(self) -> Any:
        return self.link


def content(data: bytes = b"12345678") -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"point": Array("float32", (2,), "numpy.ndarray", data)})})


def replace_kind(objects: Objects, kind: str, change: Callable[[bytes], bytes]) -> None:
    for name, value in objects.items():
        if value.startswith(kind.encode() + b" "):
            objects[name] = change(value)


def repeat_chunks(objects: Objects, tree: ObjectTree) -> None:
    """Let an array consist of its chunk 100,000 times over, in a body of 0.3 MB."""

    def repeat(value: bytes) -> bytes:
        head, _, body = value.partition(b"\x00")
        metadata = json.loads(body) | {"arraychunk_ids": [0] * 100_000}
        text = json.dumps(metadata).encode()
        kind, children, _ = head.split(b" ")
        return b" ".join([kind, children, str(len(text)).encode()]) + b"\x00" + text

    replace_kind(objects, "Array", repeat)


def cut_record(objects: Objects, tree: ObjectTree) -> None:
    replace_kind(objects, "ArrayRecord", lambda value: value[:-3])


def break_message(objects: Objects, tree: ObjectTree) -> None:
    replace_kind(objects, "Message", lambda value: value[:-4] + b"\xff\xff\xff\xff")


def other_kind(objects: Objects, tree: ObjectTree) -> None:
    replace_kind(objects, "ArrayRecord", lambda value: value.replace(b"ArrayRecord", b"Pickle"))


def many_objects(objects: Objects, tree: ObjectTree) -> None:
    tree.children.extend(ObjectTree(object_id=f"object-{number}") for number in range(10_000))


def lost_object(objects: Objects, tree: ObjectTree) -> None:
    replace_kind(objects, "ArrayChunk", lambda value: value)
    del objects[next(name for name, value in objects.items() if value.startswith(b"ArrayChunk "))]


def nothing(objects: Objects, tree: ObjectTree) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "data", "kind", "reason"),
    [
        (repeat_chunks, b"1" * 10_000, "refused", "its arrays have 1,001,800,000 bytes"),
        (cut_record, b"12345678", "refused", "cannot be decoded: JSONDecodeError"),
        (break_message, b"12345678", "refused", "cannot be decoded"),
        (other_kind, b"12345678", "refused", "an object of type Pickle"),
        (many_objects, b"12345678", "refused", f"more than {LIMITS.objects} objects"),
        (nothing, b"1" * 2_000_000, "refused", "it has more than"),
        (lost_object, b"12345678", "late", "never arrived whole"),
    ],
)
def test_a_hostile_reply_is_refused_and_costs_no_other(
    change: Callable[[Objects, ObjectTree], None], data: bytes, kind: str, reason: str
):
    link = FakeSuperLink()
    link.add("a", content(b"first"), nothing)
    link.add("b", content(data), change)
    link.add("c", content(b"last"), nothing)
    tracemalloc.start()
    taken = dict(pull_replies(FakeHttpGrid(link), ["a", "b", "c", "d"], LIMITS))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000, "nothing large is decoded"
    assert list(taken) == ["a", "b", "c"]
    failure = taken["b"]
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert reason in failure.reason
    for message_id, expected in (("a", b"first"), ("c", b"last")):
        reply = taken[message_id]
        assert isinstance(reply, Message)
        assert reply.content["arrays"]["point"].data == expected
    assert len(link.confirmed) == (3 if kind == "refused" else 2)


def test_a_reply_cannot_name_another_message_than_the_superlink_does():
    link = FakeSuperLink()
    link.add("victims", content(), nothing)
    reply, tree = link.replies.pop("victims")
    honest = message_to_proto(reply)
    honest.ClearField("content")
    honest.metadata.reply_to_message_id = "own"
    link._head = lambda reply: honest  # type: ignore[method-assign]
    link.replies["own"] = reply, tree
    assert [message_id for message_id, _ in pull_replies(FakeHttpGrid(link), ["own", "victims"], LIMITS)] == ["own"]


def test_honest_objects_have_ids_of_their_content():
    link = FakeSuperLink()
    link.add("a", content(), nothing)
    _, tree = link.replies["a"]
    assert {get_object_id(value) for value in link.objects.values()} == {
        part.object_id for part in iterate_object_tree(tree)
    }


def test_a_grid_that_raises_is_asked_for_each_reply():
    grid: InMemoryGrid = make_grid()
    pull = grid.pull_messages

    def breaks(message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        if any(grid.sent[message_id].metadata.dst_node_id == 12 for message_id in ids):
            raise ValueError("Error parsing message")
        return pull(ids)

    grid.pull_messages = breaks  # type: ignore[method-assign]
    answers = dict(make_transport(grid).send(train(), 10.0))
    assert answers.pop("cat") == Failure("refused", "its reply cannot be decoded: ValueError: Error parsing message")
    assert [(name, mean_step(answer)) for name, answer in answers.items()] == [ALL_ANSWERS[0], ALL_ANSWERS[2]]


def test_the_limits_leave_room_for_every_honest_answer():
    assert LIMITS.arrays > 8 * SHARED_BLOCKS.size
    assert replies.CHUNK * LIMITS.objects > LIMITS.arrays
