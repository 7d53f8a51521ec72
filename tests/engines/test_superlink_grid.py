"""The grid of a server's app: by the exchange where a node waits there, else by Flower; nothing twice, nothing lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from grpo_fed.engines.exchange import exchange as exchange_module
from grpo_fed.engines.exchange.exchange import NodeAnswer
from grpo_fed.engines.exchange.routes import ExchangeRoutes
from grpo_fed.engines.flower.superlink_grid import SuperLinkGrid
from grpo_fed.engines.wire.flower_private import pack, unpack
from grpo_fed.engines.wire.grids import to_failure
from grpo_fed.engines.wire.packing import unpack_from_record
from tests.engines.test_exchange_routes import SuperLink
from tests.support.in_memory_grid import InMemoryGrid, enter_run

RUN, ANT, BEE = 7, 11, 12


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(monkeypatch)


class FlowersGrid(InMemoryGrid):
    """Flower's grid of a run on a SuperLink, whose nodes reply with nothing."""

    def __init__(self, superlink: SuperLink) -> None:
        super().__init__({ANT: lambda message: None, BEE: lambda message: None})
        state = superlink.factory.state()
        task = state.create_task("flwr-serverapp", RUN)
        assert task is not None
        token = state.claim_task(task)
        assert token is not None
        state.activate_task(task)
        self._runtime_client = RuntimeClient(superlink, token)
        self.failures = 0
        """How many pushes fail from now on."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        if self.failures:
            self.failures -= 1
            raise ObjectPushError("object", RUN, "session")
        return super().push_messages(messages)


class RuntimeClient:
    """Flower's connection of an app, with a SuperLink in this process."""

    def __init__(self, superlink: SuperLink, token: str) -> None:
        self.superlink, self.token, self._retry_invoker = superlink, token, object()

    def _unary_unary(
        self, *, path: str, rpc_method: str, request: Any, response_type: Any, timeout: float | None = None
    ) -> Any:
        assert self._retry_invoker is None
        headers = [(TASK_TOKEN_HEADER.encode(), self.token.encode())]
        status, body = self.superlink.post(path, request.SerializeToString(), headers)
        url = httpx.Request("POST", "http://here")
        httpx.Response(status, content=body, request=url).raise_for_status()
        return response_type.FromString(body)


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def flowers(superlink: SuperLink) -> FlowersGrid:
    return FlowersGrid(superlink)


def visit(superlink: SuperLink, node: int, *has: str) -> exchange_module.Next:
    """Let a node ask for a message."""
    return asyncio.run(superlink.routes.exchange.next(node, has, (), 0.0))


def message(node: int, number: int = 0) -> Message:
    return Message(RecordDict({"part": ConfigRecord({"number": number})}), node, "train")


def number_of(content: RecordDict) -> object:
    record = content["part"]
    assert isinstance(record, ConfigRecord)
    return record["number"]


def answer(superlink: SuperLink, node: int, message_id: str, number: int) -> None:
    content = pack(RecordDict({"part": ConfigRecord({"number": number})})).tobytes()
    assert superlink.routes.exchange.answer(node, NodeAnswer(message_id, content))


def test_messages_go_by_the_exchange_and_replies_are_read_once(superlink: SuperLink, flowers: FlowersGrid):
    grid = SuperLinkGrid(flowers)
    for node in (ANT, BEE):
        visit(superlink, node)
    messages = [message(ANT, 3), message(BEE, 3)]
    ids = list(grid.push_messages(messages))
    assert [each.metadata.message_id for each in messages] == ids
    assert not flowers.sent
    found = visit(superlink, ANT).instruction
    assert found is not None
    assert found.id == ids[0]
    assert number_of(unpack(np.frombuffer(found.content, np.uint8))) == 3
    other = visit(superlink, BEE).instruction
    assert other is not None
    assert other.content is found.content, "the same content is there once"
    answer(superlink, ANT, ids[0], 5)
    (reply,) = grid.pull_messages(ids)
    assert (reply.metadata.reply_to_message_id, number_of(reply.content)) == (ids[0], 5)
    assert list(grid.pull_messages(ids[1:])) == []
    assert visit(superlink, ANT, ids[0]).drop == (ids[0],), "what was read is over"


def test_messages_to_nodes_that_do_not_wait_go_by_flower(superlink: SuperLink, flowers: FlowersGrid):
    grid = SuperLinkGrid(flowers)
    visit(superlink, BEE)
    ids = list(grid.push_messages([message(ANT, 1), message(BEE, 2)]))
    (sent,) = flowers.sent.values()
    assert (sent.metadata.dst_node_id, sent.metadata.message_id) == (ANT, ids[0])
    assert number_of(unpack_from_record(sent.content)) == 1
    found = visit(superlink, BEE).instruction
    assert found is not None
    assert found.id == ids[1]


def test_only_what_goes_by_flower_is_pushed_again(superlink: SuperLink, flowers: FlowersGrid):
    grid = SuperLinkGrid(flowers)
    visit(superlink, BEE)
    flowers.failures = 2
    messages = [message(ANT, 1), message(BEE, 2)]
    ids = list(grid.push_messages(messages))
    assert [each.metadata.message_id for each in messages] == ids
    assert list(flowers.sent) == [ids[0]]
    flowers.failures = 9
    assert next(iter(grid.push_messages([message(ANT)]))) == ""


def test_without_an_exchange_everything_goes_by_flower(superlink: SuperLink, flowers: FlowersGrid):
    superlink.routes = superlink.passed_on  # type: ignore[assignment]
    grid = SuperLinkGrid(flowers)
    ids = list(grid.push_messages([message(ANT), message(BEE)]))
    assert list(flowers.sent) == ids
    assert list(grid.get_node_ids()) == [ANT, BEE]
    flowers.clients[ANT] = lambda each: each.content
    (reply,) = grid.pull_messages(ids, 5.0)
    assert number_of(reply.content) == 0


def test_a_new_superlink_is_asked_again_by_the_same_ids(superlink: SuperLink, flowers: FlowersGrid):
    grid = SuperLinkGrid(flowers)
    visit(superlink, ANT)
    (first,) = grid.push_messages([message(ANT, 1)])
    superlink.routes = ExchangeRoutes(superlink.passed_on)
    assert list(grid.pull_messages([first])) == []
    assert superlink.routes.exchange.runs == {RUN}
    found = visit(superlink, ANT).instruction
    assert found is not None
    assert found.id == first
    assert not flowers.sent


def test_the_next_message_waits_at_a_new_superlink_for_a_node_that_was_there(
    superlink: SuperLink, flowers: FlowersGrid
):
    grid = SuperLinkGrid(flowers)
    visit(superlink, ANT)
    list(grid.push_messages([message(ANT, 1)]))
    superlink.routes = ExchangeRoutes(superlink.passed_on)
    list(grid.push_messages([message(ANT, 2), message(BEE, 2)]))
    assert [each.metadata.dst_node_id for each in flowers.sent.values()] == [BEE]


def test_a_node_that_falls_silent_has_died(superlink: SuperLink, flowers: FlowersGrid, monkeypatch: pytest.MonkeyPatch):
    grid = SuperLinkGrid(flowers)
    visit(superlink, ANT)
    ids = list(grid.push_messages([message(ANT)]))
    monkeypatch.setattr(exchange_module, "SILENT_SECONDS", -1.0)
    (reply,) = grid.pull_messages(ids)
    failure = to_failure(reply.error)
    assert (failure.kind, failure.reason) == ("died", "its node has given no sign of life for 30 seconds")
    assert list(grid.get_node_ids()) == [BEE]


def test_what_is_given_up_is_dropped_with_the_next_request(superlink: SuperLink, flowers: FlowersGrid):
    grid = SuperLinkGrid(flowers)
    visit(superlink, ANT)
    (first,) = grid.push_messages([message(ANT, 1)])
    grid.forget([first])
    assert visit(superlink, ANT, first).drop == ()
    (second,) = grid.push_messages([message(ANT, 2)])
    found = visit(superlink, ANT, first)
    assert found.drop == (first,)
    assert found.instruction is not None
    assert found.instruction.id == second


def test_an_answer_that_cannot_be_read_has_no_records(superlink: SuperLink, flowers: FlowersGrid):
    grid = SuperLinkGrid(flowers)
    visit(superlink, ANT)
    (first,) = grid.push_messages([message(ANT)])
    superlink.routes.exchange.answer(ANT, NodeAnswer(first, b"\xff\xff"))
    (reply,) = grid.pull_messages([first])
    assert not reply.content
