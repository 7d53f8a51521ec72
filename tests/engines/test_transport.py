from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from grpo_fed.engines import wire
from grpo_fed.engines.wire import Codec
from grpo_fed.engines.wire import registry as roll
from grpo_fed.engines.wire import transport as mail
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    EvaluationPlan,
    Instruction,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario
from tests.support.in_memory_grid import Client, Village, enter_run

SCENARIO = Scenario.loads("""
name = "mail"
rounds = 9
[policy]
hidden = [2]
[[clients]]
name = "dog"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "ant"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "cat"
env = "grpo_fed/CartPole-v1"
""")
COMMONS = resolve_shared_blocks(SCENARIO)
WIRE = Codec(COMMONS, SCENARIO)
SHARED = COMMONS.initial.numpy()
NODES = {11: "ant", 12: "cat", 13: "dog"}


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


def answer_to(instruction: Instruction, number: float) -> Answer:
    match instruction:
        case Train():
            return Trained(instruction.start.shared + np.float32(number), 100, 2, 0.0, 0.0, {})
        case Measure():
            return Measured(tuple(number for _ in instruction.fractions))
        case _:
            raise AssertionError(instruction)


def honest(number: float) -> Client:
    def client(message: Message) -> RecordDict:
        told = WIRE.read_instruction(message.metadata.message_type, message.content)
        return WIRE.write_answer(told, answer_to(told, number))

    return client


def village(streams: bool = False, **others: Client) -> Village:
    """Ant, cat and dog answer 1, 2 and 3, but for those who do otherwise."""
    clients = {name: honest(number) for number, name in enumerate(NODES.values(), 1)} | others
    return Village({node: clients[name] for node, name in NODES.items()}, streams)


def post_of(grid: Village, nodes: Mapping[int, str] | None = NODES) -> GridTransport:
    return GridTransport(grid, COMMONS, SCENARIO, nodes)


def train(round: int = 1, names: Iterable[str] = ("dog", "cat", "ant")) -> dict[str, Instruction]:
    return {name: Train(Start("run", round, SHARED), 0.0, 0.1) for name in names}


def moved(answer: Answer | Failure) -> float:
    assert isinstance(answer, Trained)
    return round(float((answer.point - SHARED).mean()), 4)


EVERYBODY = [("ant", 1.0), ("cat", 2.0), ("dog", 3.0)]


# Who answers what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_everybody_answers_in_the_order_of_their_names(streams: bool):
    post = post_of(village(streams))
    assert [(name, moved(answer)) for name, answer in post.send(train(), 10.0)] == EVERYBODY
    some = {name: Measure(Start("run", 1, SHARED), SHARED + 1, ((1.0, 0.5), (0.0, 1.0))) for name in ("dog", "ant")}
    assert [(name, answer.kl) for name, answer in post.send(some, 10.0)] == [("ant", (1.0, 1.0)), ("dog", (3.0, 3.0))]


def test_whoever_is_quick_waits_for_those_before():
    grid = village()
    for node, pull in ((11, 3), (12, 1), (13, 2)):
        grid.clients[node] = from_pull(grid, pull, grid.clients[node])
    answers = post_of(grid).send(train(), 10.0)
    found = [(name, moved(answer), grid.pulls) for name, answer in answers]
    assert found == [("ant", 1.0, 3), ("cat", 2.0, 3), ("dog", 3.0, 3)]


def from_pull(grid: Village, number: int, client: Client) -> Client:
    """A client that needs so many questions."""
    return lambda message: client(message) if grid.pulls >= number else None


def test_a_grid_that_answers_at_once_is_heard_at_once():
    asked: list[str] = []

    def noting(name: str, client: Client) -> Client:
        def note(message: Message) -> RecordDict | Error | None:
            asked.append(name)
            return client(message)

        return note

    grid = village(streams=True)
    grid.clients = {node: noting(NODES[node], client) for node, client in grid.clients.items()}
    for number, (name, _) in enumerate(post_of(grid).send(train(), 10.0), 1):
        assert asked == ["ant", "cat", "dog"][:number]
        assert asked[-1] == name


def test_arrays_for_all_are_encoded_once():
    grid = village(ant=lambda _: None, cat=lambda _: None, dog=lambda _: None)
    post = post_of(grid)
    assert [answer.kind for _, answer in post.send(train(), 0.0) if isinstance(answer, Failure)] == ["late"] * 3
    arrays = [message.content["arrays"] for message in grid.sent.values()]
    assert len(arrays) == 3
    assert all(one is arrays[0] for one in arrays)


@pytest.mark.parametrize("streams", [False, True])
def test_bytes_are_counted_both_ways(streams: bool):
    post = post_of(village(streams))
    assert (post.bytes_up, post.bytes_down) == (0, 0)
    told, said = train()["ant"], answer_to(train()["ant"], 1.0)
    list(post.send(train(), 10.0))
    more = 0 if streams else wire.write_shared_blocks(COMMONS).count_bytes()
    assert post.bytes_down == 3 * (wire.content_size(WIRE.write_instruction(told)) + more)
    assert post.bytes_up == 3 * wire.content_size(WIRE.write_answer(told, said))
    assert post.bytes_up > 3 * 4 * COMMONS.size


def test_messages_say_what_they_are_and_how_long_they_live():
    for streams, extra in ((False, 300), (True, 0)):
        for deadline, life in ((60.0, 60), (None, 10 * 365 * 86_400)):
            grid = village(streams)
            seen: list[Message] = []
            grid.clients[11] = lambda message, seen=seen: seen.append(message) or honest(1)(message)
            list(post_of(grid).send(train(4, ["ant"]), deadline))
            (message,) = seen
            assert (message.metadata.message_type, message.metadata.group_id) == ("train", "4")
            assert message.metadata.ttl == life + extra


# Who does not ---------------------------------------------------------------------------------------------------------

ERRORS = [
    (Error(2, "<class 'builtins.ValueError'>:<'no\n such file'>"), "raised", "ValueError: no such file"),
    (Error(1, "An exception was raised when attempting to load `ClientApp`"), "raised", "An exception was raised"),
    (Error(8, "ClientApp process crashed"), "died", "ClientApp process crashed"),
    (Error(5, "Node Unavailable"), "died", "Node Unavailable"),
    (Error(4, "expired"), "late", "expired"),
    (Error(0), "died", "Flower's error 0"),
    (Error(2, "\x1b]0;mine\x07\x1b[2Jnothing\u202ewrong"), "raised", "]0;mine [2Jnothing wrong"),
    (Error(2, "x" * 1000), "raised", "x" * 296 + " ..."),
]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("error", "kind", "reason"), ERRORS)
def test_a_client_that_fails_is_named_and_the_others_count(error: Error, kind: str, reason: str, streams: bool):
    post = post_of(village(streams, cat=lambda _: error))
    answers = dict(post.send(train(), 10.0))
    assert list(answers) == ["ant", "cat", "dog"]
    assert isinstance(answers["cat"], Failure)
    assert answers["cat"].kind == kind
    assert answers["cat"].reason.startswith(reason)
    assert "\n" not in answers["cat"].reason
    assert [moved(answers[name]) for name in ("ant", "dog")] == [1.0, 3.0]


def test_an_error_that_the_server_side_tells_of_a_lost_node_finds_its_client():
    grid = village()
    original = grid.reply_to

    def from_the_superlink(name: str) -> Message | None:
        node = grid.sent[name].metadata.dst_node_id
        reply = original(name)
        if node == 12 and reply is not None:
            reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    grid.clients[12] = lambda _: Error(5, "gone")
    grid.reply_to = from_the_superlink  # type: ignore[method-assign]
    assert dict(post_of(grid).send(train(), 10.0))["cat"] == Failure("died", "gone")


@pytest.mark.parametrize("streams", [False, True])
def test_who_has_not_answered_by_the_deadline_is_late(streams: bool):
    post = post_of(village(streams, ant=lambda _: None))
    began = time.monotonic()
    answers = list(post.send(train(), 0.3))
    assert answers[0] == ("ant", Failure("late", "no answer within 0.3 seconds"))
    assert [(name, moved(answer)) for name, answer in answers[1:]] == EVERYBODY[1:]
    assert time.monotonic() - began < 3


def test_an_answer_that_came_with_the_deadline_still_counts():
    born = time.monotonic()
    slow = honest(1)
    post = post_of(village(ant=lambda message: slow(message) if time.monotonic() - born > 0.25 else None))
    assert [(name, moved(answer)) for name, answer in post.send(train(), 0.25)] == EVERYBODY


@pytest.mark.parametrize("streams", [False, True])
def test_a_late_reply_is_no_answer_to_a_later_message(streams: bool):
    grid = village(streams, ant=lambda _: None)
    post = post_of(grid)
    first = dict(post.send(train(1), 0.1))
    assert isinstance(first["ant"], Failure)
    (late,) = grid.sent.values()
    grid.clients[11] = honest(7)
    told = WIRE.read_instruction("train", late.content)
    forgotten = Message(WIRE.write_answer(told, answer_to(told, 5.0)), reply_to=late)
    grid.order = lambda replies: [forgotten, *replies, *replies]  # and everything twice
    stream = grid.send_and_receive

    def streamed(messages: Sequence[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in stream(messages, timeout=timeout):
            yield from (forgotten, reply, reply)

    grid.send_and_receive = streamed  # type: ignore[method-assign]
    up = post.bytes_up
    second = [(name, moved(answer)) for name, answer in post.send(train(2), 10.0)]
    assert second == [("ant", 7.0), *EVERYBODY[1:]]
    assert post.bytes_up - up == 3 * wire.content_size(forgotten.content)


def test_what_cannot_be_true_is_refused_and_the_client_named():
    def forger(message: Message) -> RecordDict:
        content = honest(2)(message)
        assert isinstance(content, RecordDict)
        content["learned"]["steps"] = 10**9
        return content

    answers = dict(post_of(village(cat=forger)).send(train(), 10.0))
    assert isinstance(answers["cat"], Failure)
    assert answers["cat"].kind == "refused"
    assert answers["cat"].reason.startswith("learned.steps is 1000000000; it has to be from 0 to")
    assert moved(answers["dog"]) == 3.0


def test_a_point_that_is_no_number_is_refused():
    answers = dict(post_of(village(cat=honest(math.nan), dog=honest(1e9))).send(train(), 10.0))
    reasons = {name: answer.reason for name, answer in answers.items() if isinstance(answer, Failure)}
    assert reasons["cat"].startswith("arrays.point is nan at entry 0")
    assert "from the shared blocks" in reasons["dog"]


def test_a_client_without_a_node_is_unreachable():
    grid = village()
    del grid.clients[12]
    post = post_of(grid)
    assert post.reachable() == ("dog", "ant")  # as the scenario has them
    answers = dict(post.send(train(), 10.0))
    assert answers["cat"] == Failure("unreachable", "no node is connected for it")
    assert moved(answers["dog"]) == 3.0
    grid.clients[12] = honest(2)
    assert [(name, moved(answer)) for name, answer in post.send(train(), 10.0)] == EVERYBODY


class Registry(Village):
    """One that says when its nodes were started."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        super().__init__(clients)
        self.started = dict.fromkeys(clients, "2026-01-01T00:00:00")

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, last_activated_at=time) for node, time in self.started.items()]


def test_a_node_that_is_started_anew_is_told_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mail, "AGAIN", 0.0)
    grid = Registry(village().clients)
    told: list[str] = []

    def forgets(message: Message) -> RecordDict | None:
        """What it had been told when it was killed."""
        if message.metadata.message_id not in told:
            told.append(message.metadata.message_id)
        if grid.pulls == 3:
            grid.started[12] = "2026-01-01T00:01:00"
        return honest(2)(message) if message.metadata.message_id != told[0] else None

    grid.clients[12] = forgets
    assert [(name, moved(answer)) for name, answer in post_of(grid).send(train(), 10.0)] == EVERYBODY
    assert len(told) == 2
    assert list(grid.sent) == [told[0]], "nobody asks for the first any more, and nobody else was told twice"


@pytest.mark.parametrize("both", [False, True])
def test_of_a_message_that_was_told_twice_an_error_counts_only_if_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch, both: bool
):
    monkeypatch.setattr(mail, "AGAIN", 0.0)
    grid = Registry(village().clients)
    told: list[str] = []

    def fails(message: Message) -> RecordDict | Error | None:
        """At first it is silent; told anew, it fails at one of them, and at the other only later if at all."""
        if message.metadata.message_id not in told:
            told.append(message.metadata.message_id)
        grid.started[12] = "2026-01-01T00:01:00"
        if len(told) < 2 or (message.metadata.message_id == told[1] and grid.pulls < 6):
            return None
        return honest(2)(message) if message.metadata.message_id == told[1] and not both else Error(2, "lost")

    grid.clients[12] = fails
    answers = dict(post_of(grid).send(train(), 10.0))
    assert len(told) == 2
    if both:
        assert answers["cat"] == Failure("raised", "lost")
    else:
        assert moved(answers["cat"]) == 2.0


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_messages_that_a_killed_superlink_had_half_of_go_out_anew(fails: int):
    grid = village()
    push, tries = grid.push_messages, iter(range(fails))

    def breaks(messages: Iterable[Message]) -> Iterable[str]:
        if next(tries, None) is not None:
            push(messages)
            raise ObjectPushError("object", 1, "session")
        return push(messages)

    grid.push_messages = breaks  # type: ignore[method-assign]
    answers = list(post_of(grid).send(train(), 10.0))
    if fails == 3:
        assert [name for name, _ in answers] == ["ant", "cat", "dog"]
        assert {answer.kind for _, answer in answers if isinstance(answer, Failure)} == {"unreachable"}
    else:
        assert [(name, moved(answer)) for name, answer in answers] == EVERYBODY
        assert len(grid.sent) == 3 * fails, "what was half there is never asked for"


def test_a_message_that_the_grid_does_not_take_is_no_answer():
    grid = village()
    push = grid.push_messages
    grid.push_messages = lambda messages: [None, *list(push(messages))[1:]]  # type: ignore[method-assign, list-item]
    answers = dict(post_of(grid).send(train(), 10.0))
    assert answers["ant"] == Failure("unreachable", "the message could not be handed to its node")
    assert moved(answers["dog"]) == 3.0


def test_nobody_has_to_be_heard_to_the_end():
    post = post_of(village(streams=True))
    answers = post.send(train(), 10.0)
    assert next(answers)[0] == "ant"
    answers.close()  # type: ignore[attr-defined]
    assert [name for name, _ in post.send(train(2), 10.0)] == ["ant", "cat", "dog"]


# Who is who -----------------------------------------------------------------------------------------------------------


def called(name: str, then: Client = honest(1)) -> Client:  # noqa: B008
    """A node that says its name when it is asked."""

    def client(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == "query.hello":
            return wire.write_hello(wire.Hello(name))
        return then(message)

    return client


def test_nodes_say_whose_they_are():
    grid = Village({70: called("cat", honest(2)), 71: called("ant")})
    post = post_of(grid, None)
    assert post.reachable() == ("ant", "cat")
    assert [(name, moved(answer)) for name, answer in post.send(train(1, ["cat", "ant"]), 10.0)] == EVERYBODY[:2]
    grid.clients[72] = called("dog", honest(3))
    assert post.reachable() == ("dog", "ant", "cat")
    hellos = [message for message in grid.sent.values() if message.metadata.message_type == "query.hello"]
    assert not hellos, "each was asked once, and answered"
    assert [(name, moved(answer)) for name, answer in post.send(train(), 10.0)] == EVERYBODY
    del grid.clients[70]
    assert post.reachable() == ("dog", "ant")


def test_nobody_is_waited_for_to_say_a_name():
    awake: list[bool] = []
    grid = Village({70: lambda message: called("cat")(message) if awake else None})
    post = post_of(grid, None)
    assert post.reachable() == ()
    assert post.reachable() == ()
    assert len(grid.sent) == 1, "asked once"
    awake.append(True)
    assert post.reachable() == ("cat",)


def test_who_does_not_answer_is_asked_again_after_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roll, "HELLO", 0.05)
    grid = Village({70: lambda _: None})
    post = post_of(grid, None)
    post.reachable()
    time.sleep(0.1)
    post.reachable()
    assert len(grid.sent) == 2


def test_of_two_nodes_with_one_name_the_later_is_turned_away(caplog: pytest.LogCaptureFixture):
    grid = Village({70: called("cat", honest(2))})
    post = post_of(grid, None)
    assert post.reachable() == ("cat",)
    grid.clients[60] = called("cat", honest(9))
    with caplog.at_level(logging.WARNING):
        assert post.reachable() == ("cat",)
        assert post.reachable() == ("cat",)
    assert post.rejected == {60: "says that it is cat, as node 70 does, which came before it"}
    assert caplog.messages == ["node 60 says that it is cat, as node 70 does, which came before it"]
    assert moved(dict(post.send(train(1, ["cat"]), 10.0))["cat"]) == 2.0
    del grid.clients[70]  # it was the ghost of a node that was started again
    assert post.reachable() == ("cat",)
    assert post.rejected == {}
    assert moved(dict(post.send(train(1, ["cat"]), 10.0))["cat"]) == 9.0


def test_a_stranger_is_turned_away(caplog: pytest.LogCaptureFixture):
    post = post_of(Village({70: called("cta"), 71: called("dog"), 72: called("cta")}), None)
    assert post.reachable() == ("dog",)
    assert post.reachable() == ("dog",)
    why = "says that it is cta, and the scenario has no such client; did you mean cat?"
    assert post.rejected == {70: why, 72: why}
    assert len(caplog.messages) == 2
    assert dict(post.send(train(1, ["cat"]), 10.0))["cat"] == Failure("unreachable", "no node is connected for it")


def test_a_node_is_heard_under_the_name_that_its_key_was_made_for_and_no_other():
    grid = Village({70: called("cat", honest(9)), 71: called("ant"), 72: called("dog", honest(9))})
    roll = NodeRegistry(grid, COMMONS.clients, keys={70: "dog", 71: "ant"})
    post = GridTransport(grid, COMMONS, SCENARIO, roll)
    assert post.reachable() == ("ant",)
    assert post.rejected == {
        70: "says that it is cat, but its key was made for dog",
        72: "says that it is dog, but its key is nobody's",
    }
    assert dict(post.send(train(1, ["cat"]), 10.0))["cat"] == Failure("unreachable", "no node is connected for it")
    assert roll.task_shapes == {"ant": None}, "what others said of their tasks is not used"


def test_a_node_that_cannot_say_its_name_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    tries: list[int] = []

    def confused(message: Message) -> RecordDict | Error | None:
        tries.append(1)
        match len(tries):
            case 1:
                return Error(2, "<class 'ValueError'>:<'node-config says no client'>")
            case 2:
                return RecordDict({"hello": ConfigRecord({"client": 3})})
            case _:
                return called("cat")(message)

    post = post_of(Village({70: confused}), None)
    assert post.reachable() == ()
    assert post.rejected == {70: "did not say whose it is: ValueError: node-config says no client"}
    assert post.reachable() == ()
    assert len(tries) == 1, "it is given time"
    monkeypatch.setattr(roll, "CALM", 0.0)
    post = post_of(Village({70: confused}), None)
    assert post.reachable() == ()
    assert post.rejected == {70: "did not say whose it is: hello.client is 3; it has to be a str"}
    assert post.reachable() == ("cat",)
    assert post.rejected == {}


def test_evaluations_go_through_as_well():
    def refuses(message: Message) -> Error:
        assert message.metadata.message_type == "evaluate"
        return Error(2, "not today")

    told = {"ant": Evaluate(Start("run", 0, SHARED), EvaluationPlan(0))}
    assert list(post_of(village(ant=refuses)).send(told, 10.0)) == [("ant", Failure("raised", "not today"))]


def test_a_round_of_many_clients_costs_little_for_each():
    dogs = SCENARIO.clients[0].model_copy(update={"count": 500})
    scenario = SCENARIO.model_copy(update={"clients": [dogs]})
    commons = resolve_shared_blocks(scenario)
    nodes = dict(enumerate(commons.clients, 1))
    letters = Codec(commons, scenario)
    told = {name: Train(Start("run", 1, SHARED), 0.0, 0.1) for name in commons.clients}
    said = letters.write_answer(told["dog-0"], answer_to(told["dog-0"], 1.0))
    grid = Village(dict.fromkeys(nodes, lambda _: said), streams=True)
    post = GridTransport(grid, commons, scenario, nodes)
    costs = []
    for _ in range(5):
        began = time.process_time()
        answers = list(post.send(told, 60.0))
        costs.append((time.process_time() - began) / len(told))
        assert all(isinstance(answer, Trained) for _, answer in answers)
    assert min(costs) < 0.5e-3
