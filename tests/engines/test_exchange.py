"""What a SuperLink keeps in memory: who gets what, what is forgotten when, and nothing is lost. Time stands still."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pytest

from grpo_fed.engines.exchange import exchange as module
from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.exchange.exchange import Exchange, Next, NodeAnswer, NodeMessage
from grpo_fed.engines.exchange.protocol import InvalidBodyError

RUN, OTHER_RUN, ANT, BEE = 1, 2, 11, 12
Result = TypeVar("Result")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def exchange(clock: Clock) -> Exchange:
    """An exchange at which the nodes of ant and bee have been."""
    exchange = Exchange(clock)
    for node, client in ((ANT, "ant"), (BEE, "bee")):
        exchange.arrive(node, client)
        assert next_of(exchange, node).ask_flower, "a node that has just come may have a message at Flower"
    return exchange


def do(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


def next_of(exchange: Exchange, node: int, working: Sequence[str] = (), answered: Sequence[str] = ()) -> Next:
    return do(exchange.next(node, working, answered, 0.0))


def instruction(name: str, node: int = ANT) -> NodeMessage:
    return NodeMessage(name, node, "train", name.encode())


def heard_of(exchange: Exchange, *ids: str) -> list[str]:
    return [answer.id for answer in do(exchange.hear(RUN, ids, 0.0)).answers]


# The usual way -------------------------------------------------------------------------------------------------------


def test_a_message_goes_to_its_node_and_its_answer_to_the_app(exchange: Exchange):
    assert exchange.ask(RUN, [instruction("a"), instruction("b", BEE)]) == ("a", "b")
    found = next_of(exchange, ANT)
    assert (found.instruction, found.run) == (instruction("a"), RUN)
    assert next_of(exchange, ANT, working=["a"]).instruction is None
    assert exchange.answer(ANT, NodeAnswer("a", b"done"))
    assert do(exchange.hear(RUN, ["a", "b"], 0.0)).answers == (NodeAnswer("a", b"done"),)


def test_both_sides_wait_for_each_other():
    async def both() -> tuple[Next, tuple[NodeAnswer, ...]]:
        exchange = Exchange()
        exchange.arrive(ANT, "ant")
        await exchange.next(ANT, (), (), 5.0)
        waiting = asyncio.create_task(exchange.next(ANT, (), (), 5.0))
        await asyncio.sleep(0)
        exchange.ask(RUN, [instruction("a")])
        hearing = asyncio.create_task(exchange.hear(RUN, ["a"], 5.0))
        found = await asyncio.wait_for(waiting, 1)
        exchange.answer(ANT, NodeAnswer("a", b"done"))
        return found, (await asyncio.wait_for(hearing, 1)).answers

    found, answers = do(both())
    assert found.instruction == instruction("a")
    assert answers == (NodeAnswer("a", b"done"),)


def test_a_busy_node_gets_its_next_message_and_is_told_what_is_over(exchange: Exchange):
    exchange.ask(RUN, [instruction("a")])
    next_of(exchange, ANT)
    exchange.end(RUN, ["a"])
    exchange.ask(RUN, [instruction("b")])
    found = next_of(exchange, ANT, working=["a"])
    assert found.instruction == instruction("b")
    assert found.drop == ("a",)


def test_messages_are_given_in_the_order_in_which_they_were_asked(exchange: Exchange):
    exchange.ask(RUN, [instruction("a"), instruction("b")])
    assert next_of(exchange, ANT).instruction == instruction("a")
    assert next_of(exchange, ANT, working=["a"]).instruction == instruction("b")


# Nothing is lost -----------------------------------------------------------------------------------------------------


def test_a_request_that_is_repeated_changes_nothing(exchange: Exchange):
    for _ in range(2):
        assert exchange.ask(RUN, [instruction("a")]) == ("a",)
        assert next_of(exchange, ANT).instruction == instruction("a"), "a node without it gets it again"
    for content in (b"first", b"second"):
        assert exchange.answer(ANT, NodeAnswer("a", content))
    for _ in range(2):
        assert do(exchange.hear(RUN, ["a"], 0.0)).answers == (NodeAnswer("a", b"first"),)
    exchange.end(RUN, ["a"])
    assert exchange.ask(RUN, [instruction("a")]) == ("a",), "it was taken, and is over"
    assert next_of(exchange, ANT).instruction is None


def test_a_restarted_node_gets_what_the_one_before_had(exchange: Exchange):
    exchange.ask(RUN, [instruction("a")])
    next_of(exchange, ANT)
    exchange.arrive(ANT, "ant")
    assert next_of(exchange, ANT).instruction == instruction("a")


def test_a_new_superlink_is_given_the_answers_that_the_nodes_have(exchange: Exchange, clock: Clock):
    new = Exchange(clock)
    assert new.epoch != exchange.epoch
    assert next_of(new, ANT, answered=["a"]).drop == (), "the app may still ask for it"
    assert new.ask(RUN, [instruction("a"), instruction("b", BEE)], again=True) == ("a", "b")
    found = next_of(new, ANT, answered=["a"])
    assert (found.instruction, found.again) == (None, ("a",)), "it does not train twice"
    assert next_of(new, BEE, working=["b"]).instruction is None
    assert new.answer(ANT, NodeAnswer("a", b"done"))
    assert heard_of(new, "a", "b") == ["a"]


def test_a_new_superlink_lets_nodes_drop_what_no_app_has_asked_for_again(clock: Clock):
    new = Exchange(clock)
    assert next_of(new, ANT, working=["a"]).drop == ()
    clock.now += module.FORGET_SECONDS + 1
    assert next_of(new, ANT, working=["a"]).drop == ("a",)


def test_an_app_does_not_wait_for_what_a_superlink_does_not_know(exchange: Exchange):
    heard = do(asyncio.wait_for(exchange.hear(RUN, ["a"], 1e9), 1))
    assert (heard.answers, heard.silent) == ((), ())


# Who is gone ---------------------------------------------------------------------------------------------------------


def test_messages_are_taken_only_for_nodes_that_wait_or_did_a_moment_ago(exchange: Exchange, clock: Clock):
    clock.now += module.SILENT_SECONDS + 1
    next_of(exchange, BEE)
    assert exchange.ask(RUN, [instruction("a"), instruction("b", BEE), instruction("c", 13)]) == ("b",)
    assert next_of(exchange, ANT).ask_flower, "it has to look there, where its message goes"
    assert not next_of(exchange, ANT).ask_flower


def test_a_node_that_falls_silent_is_reported_once(exchange: Exchange, clock: Clock):
    exchange.ask(RUN, [instruction("a"), instruction("b", BEE)])
    clock.now += module.SILENT_SECONDS - 1
    next_of(exchange, BEE)
    assert do(exchange.hear(RUN, ["a", "b"], 0.0)).silent == ()
    clock.now += 2
    assert do(exchange.hear(RUN, ["a", "b"], 0.0)).silent == ("a",)
    assert do(exchange.hear(RUN, ["a", "b"], 0.0)).silent == ()
    assert next_of(exchange, ANT, working=["a"]).drop == ("a",)


def test_the_request_of_a_lost_connection_ends_when_the_node_asks_again():
    async def twice() -> Next:
        exchange = Exchange()
        exchange.arrive(ANT, "ant")
        await exchange.next(ANT, (), (), 5.0)
        lost = asyncio.create_task(exchange.next(ANT, (), (), 5.0))
        await asyncio.sleep(0)
        current = asyncio.create_task(exchange.next(ANT, (), (), 5.0))
        await asyncio.sleep(0)
        exchange.ask(RUN, [instruction("a")])
        await asyncio.wait_for(lost, 1)
        return await asyncio.wait_for(current, 1)

    assert do(twice()).instruction == instruction("a")


# Runs and nodes are apart --------------------------------------------------------------------------------------------


def test_a_node_cannot_answer_for_another(exchange: Exchange):
    exchange.ask(RUN, [instruction("a")])
    assert not exchange.answer(BEE, NodeAnswer("a", b"mine"))
    assert heard_of(exchange, "a") == []


def test_a_run_neither_hears_nor_ends_what_is_another_ones(exchange: Exchange):
    exchange.ask(OTHER_RUN, [instruction("a")])
    exchange.answer(ANT, NodeAnswer("a", b"done"))
    exchange.end(RUN, ["a"])
    assert heard_of(exchange, "a") == []
    assert do(exchange.hear(OTHER_RUN, ["a"], 0.0)).answers == (NodeAnswer("a", b"done"),)
    assert exchange.runs == {OTHER_RUN}
    exchange.end_run(OTHER_RUN)
    assert not exchange.runs
    assert next_of(exchange, ANT, answered=["a"]).drop == ("a",)


# Limits --------------------------------------------------------------------------------------------------------------


def test_answers_come_in_parts_if_they_are_large(exchange: Exchange, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ANSWERS_BYTES", 10)
    exchange.ask(RUN, [instruction(name) for name in "abc"])
    for name, size in (("a", 20), ("b", 6), ("c", 4)):
        exchange.answer(ANT, NodeAnswer(name, bytes(size)))
    assert heard_of(exchange, "a", "b", "c") == ["a"], "at least one"
    assert heard_of(exchange, "b", "c") == ["b", "c"]


def test_what_exceeds_the_memory_goes_by_flower(exchange: Exchange, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_BYTES", 3)
    assert exchange.ask(RUN, [NodeMessage(name, ANT, "train", bytes(3)) for name in "abc"]) == ("a", "b")
    exchange.end(RUN, ["a", "b"])
    assert exchange.ask(RUN, [instruction("c")]) == ("c",)


def test_ended_ids_are_not_remembered_for_ever(exchange: Exchange, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_ENDED", 2)
    exchange.ask(RUN, [instruction(name) for name in "abc"])
    exchange.end(RUN, ["a", "b", "c"])
    assert list(exchange._ended) == ["b", "c"]


# Bodies --------------------------------------------------------------------------------------------------------------


def test_a_body_has_json_and_contents():
    assert protocol.decode(protocol.encode({"a": [1, "b"]}, [b"one", b"", b"two"])) == (
        {"a": [1, "b"]},
        [b"one", b"", b"two"],
    )
    assert protocol.decode(protocol.encode({})) == ({}, [])


@pytest.mark.parametrize(
    "body", [b"", b"\x01", b"\x02\0\0\0[]", b"\x02\0\0\0{}", b"\x0d\0\0\0" + b'{"sizes":[9]}', b"\xff\0\0\0{}"]
)
def test_a_body_that_is_none_is_refused(body: bytes):
    with pytest.raises(InvalidBodyError):
        protocol.decode(body)
