from __future__ import annotations

import logging
import time

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from grpo_fed.engines import wire
from grpo_fed.engines.wire import registry
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.runs.records import Failure
from tests.support.grid_federation import (
    ALL_ANSWERS,
    SCENARIO,
    SHARED_BLOCKS,
    answers_with,
    make_transport,
    mean_step,
    mean_steps,
    train,
)
from tests.support.in_memory_grid import Client, InMemoryGrid, enter_run


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


def node_of(name: str, then: Client = answers_with(1)) -> Client:  # noqa: B008
    """Make a node that names its client when it is asked."""

    def client(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == "query.hello":
            return wire.write_hello(wire.Hello(name))
        return then(message)

    return client


def test_nodes_name_their_clients():
    grid = InMemoryGrid({70: node_of("cat", answers_with(2)), 71: node_of("ant")})
    transport = make_transport(grid, None)
    assert transport.reachable() == ("ant", "cat")
    assert [
        (name, mean_step(answer)) for name, answer in transport.send(train(1, ["cat", "ant"]), 10.0)
    ] == ALL_ANSWERS[:2]
    grid.clients[72] = node_of("dog", answers_with(3))
    assert transport.reachable() == ("dog", "ant", "cat")
    hellos = [message for message in grid.sent.values() if message.metadata.message_type == "query.hello"]
    assert not hellos, "each was asked once, and answered"
    assert mean_steps(transport.send(train(), 10.0)) == ALL_ANSWERS
    del grid.clients[70]
    assert transport.reachable() == ("dog", "ant")


def test_nodes_are_not_waited_for():
    is_ready: list[bool] = []
    grid = InMemoryGrid({70: lambda message: node_of("cat")(message) if is_ready else None})
    transport = make_transport(grid, None)
    assert transport.reachable() == ()
    assert transport.reachable() == ()
    assert len(grid.sent) == 1, "asked once"
    is_ready.append(True)
    assert transport.reachable() == ("cat",)


def test_a_silent_node_is_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "HELLO_DEADLINE", 0.05)
    grid = InMemoryGrid({70: lambda _: None})
    transport = make_transport(grid, None)
    transport.reachable()
    time.sleep(0.1)
    transport.reachable()
    assert len(grid.sent) == 2


def test_the_later_of_two_nodes_of_a_client_is_rejected(caplog: pytest.LogCaptureFixture):
    grid = InMemoryGrid({70: node_of("cat", answers_with(2))})
    transport = make_transport(grid, None)
    assert transport.reachable() == ("cat",)
    grid.clients[60] = node_of("cat", answers_with(9))
    with caplog.at_level(logging.WARNING):
        assert transport.reachable() == ("cat",)
        assert transport.reachable() == ("cat",)
    assert transport.rejected == {60: "says that it is cat, as node 70 does, which came before it"}
    assert caplog.messages == ["node 60 says that it is cat, as node 70 does, which came before it"]
    assert mean_step(dict(transport.send(train(1, ["cat"]), 10.0))["cat"]) == 2.0
    del grid.clients[70]  # it was what Flower still had of a node that was restarted
    assert transport.reachable() == ("cat",)
    assert transport.rejected == {}
    assert mean_step(dict(transport.send(train(1, ["cat"]), 10.0))["cat"]) == 9.0


def test_a_client_that_the_scenario_lacks_is_rejected(caplog: pytest.LogCaptureFixture):
    transport = make_transport(InMemoryGrid({70: node_of("cta"), 71: node_of("dog"), 72: node_of("cta")}), None)
    assert transport.reachable() == ("dog",)
    assert transport.reachable() == ("dog",)
    reason = "says that it is cta, and the scenario has no such client; did you mean cat?"
    assert transport.rejected == {70: reason, 72: reason}
    assert len(caplog.messages) == 2
    assert dict(transport.send(train(1, ["cat"]), 10.0))["cat"] == Failure("unreachable", "no node is connected for it")


def test_a_node_is_accepted_only_as_its_keys_client():
    grid = InMemoryGrid({70: node_of("cat", answers_with(9)), 71: node_of("ant"), 72: node_of("dog", answers_with(9))})
    nodes = NodeRegistry(grid, SHARED_BLOCKS.clients, keys={70: "dog", 71: "ant"})
    transport = GridTransport(grid, SHARED_BLOCKS, SCENARIO, nodes)
    assert transport.reachable() == ("ant",)
    assert transport.rejected == {
        70: "says that it is cat, but its key was made for dog",
        72: "says that it is dog, but its key is not registered",
    }
    assert dict(transport.send(train(1, ["cat"]), 10.0))["cat"] == Failure("unreachable", "no node is connected for it")
    assert nodes.task_shapes == {"ant": None}, "rejected nodes report no task"


def test_a_node_that_fails_to_name_its_client_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    tries: list[int] = []

    def confused(message: Message) -> RecordDict | Error | None:
        tries.append(1)
        match len(tries):
            case 1:
                return Error(2, "<class 'ValueError'>:<'node-config says no client'>")
            case 2:
                return RecordDict({"hello": ConfigRecord({"client": 3})})
            case _:
                return node_of("cat")(message)

    transport = make_transport(InMemoryGrid({70: confused}), None)
    assert transport.reachable() == ()
    assert transport.rejected == {70: "did not name its client: ValueError: node-config says no client"}
    assert transport.reachable() == ()
    assert len(tries) == 1, "it is given time"
    monkeypatch.setattr(registry, "PAUSE_AFTER_ERROR", 0.0)
    transport = make_transport(InMemoryGrid({70: confused}), None)
    assert transport.reachable() == ()
    assert transport.rejected == {70: "did not name its client: hello.client is 3; it has to be a str"}
    assert transport.reachable() == ("cat",)
    assert transport.rejected == {}
