"""Instructions that are submitted, and answers that are collected one by one, as rounds need that do not wait."""

from __future__ import annotations

import time

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.wire import pending
from grpo_fed.engines.wire.pending import Backoff
from grpo_fed.federation.messages import Measure, Start, Trained
from grpo_fed.federation.transport import Transport
from grpo_fed.runs.records import Failure
from tests.support.grid_federation import (
    ALL_ANSWERS,
    SCENARIO,
    SHARED,
    answers_with,
    make_grid,
    make_transport,
    mean_steps,
    train,
)
from tests.support.in_memory_grid import Client, GridWithStartTimes, InMemoryGrid, enter_run


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


def make_slow_grid() -> tuple[InMemoryGrid, set[str]]:
    """Make a grid on which ant, cat and dog answer 1, 2 and 3 as soon as they are in the set."""
    ready: set[str] = set()

    def slow(name: str, number: float) -> Client:
        client = answers_with(number)
        return lambda message: client(message) if name in ready else None

    return make_grid(**{name: slow(name, number) for name, number in ALL_ANSWERS}), ready


def test_answers_are_collected_one_by_one():
    grid, ready = make_slow_grid()
    transport: Transport = make_transport(grid)
    transport.submit(train(names=["ant", "dog"]))
    assert transport.collect(0.0) == []
    ready.add("dog")
    assert mean_steps(transport.collect(5.0)) == [("dog", 3.0)]
    assert transport.collect(0.0) == []
    ready.add("ant")
    assert mean_steps(transport.collect(5.0)) == [("ant", 1.0)]
    assert transport.collect(5.0) == [], "nothing is pending, so there is nothing to wait for"
    assert not grid.sent


def test_a_late_answer_is_collected_after_another_submit():
    grid, ready = make_slow_grid()
    transport = make_transport(grid)
    transport.submit(train(1, ["ant", "cat"]))
    ready |= {"cat", "dog"}
    assert mean_steps(transport.collect(5.0)) == [("cat", 2.0)]
    transport.submit(train(2, ["cat", "dog"]))
    ready.add("ant")
    assert mean_steps(transport.collect(5.0)) == ALL_ANSWERS


def test_a_second_instruction_replaces_the_first():
    grid, ready = make_slow_grid()
    transport = make_transport(grid)
    transport.submit(train(1, ["ant"]))
    (first,) = grid.sent
    transport.submit({"ant": Measure(Start("run", 1, SHARED), SHARED + 1, ((1.0, 0.5),))})
    ready.add("ant")
    ((name, answer),) = transport.collect(5.0)
    assert (name, answer.kl) == ("ant", (1.0,))  # type: ignore[union-attr]
    assert list(grid.sent) == [first], "the reply to the first message is never asked for"
    assert transport.collect(0.0) == []


def test_send_leaves_submitted_instructions_alone():
    grid, ready = make_slow_grid()
    transport = make_transport(grid)
    transport.submit(train(1, ["ant"]))
    ready |= {"cat", "dog"}
    assert mean_steps(transport.send(train(2, ["dog", "cat"]), 5.0)) == ALL_ANSWERS[1:]
    ready.add("ant")
    assert mean_steps(transport.collect(5.0)) == ALL_ANSWERS[:1]


def test_collect_waits_no_longer_than_its_timeout():
    grid, _ = make_slow_grid()
    transport = make_transport(grid)
    transport.submit(train(names=["ant"]))
    began = time.monotonic()
    assert transport.collect(0.3) == []
    assert 0.3 <= time.monotonic() - began < 3


def test_collect_waits_for_the_first_answer():
    grid, ready = make_slow_grid()
    transport = make_transport(grid)
    transport.submit(train())

    def answers_from_the_third_pull(replies: list[Message]) -> list[Message]:
        if grid.pulls >= 2:
            ready.add("cat")
        return replies

    grid.order = answers_from_the_third_pull
    assert mean_steps(transport.collect(5.0)) == [("cat", 2.0)]
    assert grid.pulls == 3


def test_failures_are_collected_like_answers():
    def fails(_: Message) -> Error:
        return Error(8, "gone")

    def forges(message: Message) -> RecordDict:
        content = answers_with(2)(message)
        assert isinstance(content, RecordDict)
        content["training"]["steps"] = 10**9
        return content

    grid = make_grid(cat=fails, dog=forges)
    del grid.clients[11]
    transport = make_transport(grid)
    transport.submit(train())
    answers = dict(transport.collect(5.0))
    assert answers["ant"] == Failure("unreachable", "no node is connected for it")
    answers |= dict(transport.collect(5.0))
    assert answers["cat"] == Failure("died", "gone")
    assert isinstance(answers["dog"], Failure)
    assert answers["dog"].kind == "refused"
    push = grid.push_messages
    grid.push_messages = lambda messages: [None for _ in push(messages)]  # type: ignore[method-assign, misc]
    transport.submit(train(2, ["cat"]))
    assert transport.collect(5.0) == [("cat", Failure("unreachable", "the message could not be handed to its node"))]


def test_a_client_that_is_reachable_again_has_no_old_failure():
    grid = make_grid()
    client = grid.clients.pop(11)
    transport = make_transport(grid)
    transport.submit(train(1, ["ant"]))
    grid.clients[11] = client
    transport.submit(train(2, ["ant"]))
    assert mean_steps(transport.collect(5.0)) == [("ant", 1.0)]


def test_submitted_instructions_are_sent_again_to_restarted_nodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pending, "RESTART_CHECK", 0.0)
    grid = GridWithStartTimes(make_grid().clients)
    first: list[str] = []

    def loses_the_first(message: Message) -> RecordDict | Error | None:
        if not first:
            first.append(message.metadata.message_id)
            grid.started[12] = "2026-01-01T00:01:00"
        return answers_with(2)(message) if message.metadata.message_id != first[0] else None

    grid.clients[12] = loses_the_first
    transport = make_transport(grid)
    transport.submit(train(names=["cat"]))
    size = transport.bytes_down
    assert mean_steps(transport.collect(5.0)) == [("cat", 2.0)]
    assert transport.bytes_down == 2 * size


def test_a_streaming_grid_answers_when_it_is_asked():
    transport = make_transport(make_grid(streams=True))
    transport.submit(train())
    assert mean_steps(transport.collect(0.0)) == ALL_ANSWERS
    assert transport.collect(0.0) == []


def test_clients_of_the_local_engine_answer_what_was_submitted():
    with LocalEngine(SCENARIO, workers=0) as sending, LocalEngine(SCENARIO, workers=0) as submitting:
        expected = dict(sending.federation.transport.send(train(), None))
        transport = submitting.federation.transport
        transport.submit(train(names=["ant", "dog"]))
        transport.submit(train(names=["cat"]))
        answers = dict(transport.collect(0.0))
        assert answers.keys() == expected.keys() == {"ant", "cat", "dog"}
        for name, answer in answers.items():
            assert isinstance(answer, Trained)
            np.testing.assert_array_equal(answer.point, expected[name].point)  # type: ignore[union-attr]


def test_bytes_of_submitted_messages_are_counted():
    sending, submitting = make_transport(make_grid()), make_transport(make_grid())
    list(sending.send(train(), 5.0))
    submitting.submit(train())
    assert submitting.bytes_down == sending.bytes_down > 0
    assert submitting.bytes_up == 0
    submitting.collect(5.0)
    assert submitting.bytes_up == sending.bytes_up > 0


def test_pauses_grow_with_the_time_and_the_cost_of_asking():
    backoff = Backoff()
    assert backoff.pause(found=False, took=0.0) == pytest.approx(0.075)
    assert backoff.pause(found=False, took=0.0) == pytest.approx(0.1125)
    assert backoff.pause(found=False, took=0.2) == pytest.approx(0.8)
    assert backoff.pause(found=False, took=0.0) == 1.0
    assert backoff.pause(found=True, took=5.0) == 0.05
