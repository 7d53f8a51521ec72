from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from grpo_fed.engines import wire
from grpo_fed.engines.wire import Codec, pending
from grpo_fed.engines.wire.handshake import write_own_entry
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.messages import Evaluate, EvaluationPlan, Measure, Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import Failure
from tests.support.grid_federation import (
    ALL_ANSWERS,
    CODEC,
    NODES,
    SCENARIO,
    SHARED,
    SHARED_BLOCKS,
    answer_to,
    answers_with,
    make_grid,
    make_transport,
    mean_step,
    mean_steps,
    train,
)
from tests.support.in_memory_grid import Client, GridWithStartTimes, InMemoryGrid, enter_run


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_answers_come_in_the_order_of_the_clients_names(streams: bool):
    transport = make_transport(make_grid(streams))
    assert mean_steps(transport.send(train(), 10.0)) == ALL_ANSWERS
    some = {name: Measure(Start("run", 1, SHARED), SHARED + 1, ((1.0, 0.5), (0.0, 1.0))) for name in ("dog", "ant")}
    assert [(name, answer.kl) for name, answer in transport.send(some, 10.0)] == [
        ("ant", (1.0, 1.0)),
        ("dog", (3.0, 3.0)),
    ]


def test_an_early_answer_waits_for_those_before_it():
    grid = make_grid()
    for node, pull in ((11, 3), (12, 1), (13, 2)):
        grid.clients[node] = from_pull(grid, pull, grid.clients[node])
    answers = make_transport(grid).send(train(), 10.0)
    pulls = [(name, mean_step(answer), grid.pulls) for name, answer in answers]
    assert pulls == [("ant", 1.0, 3), ("cat", 2.0, 3), ("dog", 3.0, 3)]


def from_pull(grid: InMemoryGrid, number: int, client: Client) -> Client:
    """Make a client that replies to the question of that number and later ones."""
    return lambda message: client(message) if grid.pulls >= number else None


def test_answers_of_a_streaming_grid_are_yielded_at_once():
    asked: list[str] = []

    def noting(name: str, client: Client) -> Client:
        def note(message: Message) -> RecordDict | Error | None:
            asked.append(name)
            return client(message)

        return note

    grid = make_grid(streams=True)
    grid.clients = {node: noting(NODES[node], client) for node, client in grid.clients.items()}
    for number, (name, _) in enumerate(make_transport(grid).send(train(), 10.0), 1):
        assert asked == ["ant", "cat", "dog"][:number]
        assert asked[-1] == name


def test_shared_arrays_are_encoded_once():
    grid = make_grid(ant=lambda _: None, cat=lambda _: None, dog=lambda _: None)
    transport = make_transport(grid)
    assert [answer.kind for _, answer in transport.send(train(), 0.0) if isinstance(answer, Failure)] == ["late"] * 3
    arrays = [message.content["arrays"] for message in grid.sent.values()]
    assert len(arrays) == 3
    assert all(record is arrays[0] for record in arrays)


@pytest.mark.parametrize("streams", [False, True])
def test_bytes_are_counted_both_ways(streams: bool):
    transport = make_transport(make_grid(streams))
    assert (transport.bytes_up, transport.bytes_down) == (0, 0)
    instruction, answer = train()["ant"], answer_to(train()["ant"], 1.0)
    list(transport.send(train(), 10.0))
    blocks = write_own_entry(wire.write_shared_blocks(SHARED_BLOCKS), SCENARIO, "ant")
    more = 0 if streams else blocks.count_bytes()
    assert transport.bytes_down == 3 * (wire.content_size(CODEC.write_instruction(instruction)) + more)
    assert transport.bytes_up == 3 * wire.content_size(CODEC.write_answer(instruction, answer))
    assert transport.bytes_up > 3 * 4 * SHARED_BLOCKS.size


def test_messages_carry_their_type_round_and_lifetime():
    for streams, extra in ((False, 300), (True, 0)):
        for deadline, life in ((60.0, 60), (None, 10 * 365 * 86_400)):
            grid = make_grid(streams)
            seen: list[Message] = []
            grid.clients[11] = lambda message, seen=seen: seen.append(message) or answers_with(1)(message)
            list(make_transport(grid).send(train(4, ["ant"]), deadline))
            (message,) = seen
            assert (message.metadata.message_type, message.metadata.group_id) == ("train", "4")
            assert message.metadata.ttl == life + extra


# Failures -------------------------------------------------------------------------------------------------------------

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
def test_a_failure_names_its_client_and_the_others_count(error: Error, kind: str, reason: str, streams: bool):
    transport = make_transport(make_grid(streams, cat=lambda _: error))
    answers = dict(transport.send(train(), 10.0))
    assert list(answers) == ["ant", "cat", "dog"]
    assert isinstance(answers["cat"], Failure)
    assert answers["cat"].kind == kind
    assert answers["cat"].reason.startswith(reason)
    assert "\n" not in answers["cat"].reason
    assert [mean_step(answers[name]) for name in ("ant", "dog")] == [1.0, 3.0]


def test_the_superlinks_error_about_a_node_names_its_client():
    grid = make_grid()
    original = grid.reply_to

    def from_the_superlink(name: str) -> Message | None:
        node = grid.sent[name].metadata.dst_node_id
        reply = original(name)
        if node == 12 and reply is not None:
            reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    grid.clients[12] = lambda _: Error(5, "gone")
    grid.reply_to = from_the_superlink  # type: ignore[method-assign]
    assert dict(make_transport(grid).send(train(), 10.0))["cat"] == Failure("died", "gone")


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_without_an_answer_at_the_deadline_is_late(streams: bool):
    transport = make_transport(make_grid(streams, ant=lambda _: None))
    began = time.monotonic()
    answers = list(transport.send(train(), 0.3))
    assert answers[0] == ("ant", Failure("late", "no answer within 0.3 seconds"))
    assert mean_steps(answers[1:]) == ALL_ANSWERS[1:]
    assert time.monotonic() - began < 3


def test_an_answer_at_the_deadline_still_counts():
    born = time.monotonic()
    slow = answers_with(1)
    transport = make_transport(make_grid(ant=lambda message: slow(message) if time.monotonic() - born > 0.25 else None))
    assert mean_steps(transport.send(train(), 0.25)) == ALL_ANSWERS


@pytest.mark.parametrize("streams", [False, True])
def test_a_late_reply_is_no_answer_to_a_later_message(streams: bool):
    grid = make_grid(streams, ant=lambda _: None)
    transport = make_transport(grid)
    first = dict(transport.send(train(1), 0.1))
    assert isinstance(first["ant"], Failure)
    (late,) = grid.sent.values()
    grid.clients[11] = answers_with(7)
    instruction = CODEC.read_instruction("train", late.content)
    late_reply = Message(CODEC.write_answer(instruction, answer_to(instruction, 5.0)), reply_to=late)
    grid.order = lambda replies: [late_reply, *replies, *replies]  # and everything twice
    stream = grid.send_and_receive

    def streamed(messages: Sequence[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in stream(messages, timeout=timeout):
            yield from (late_reply, reply, reply)

    grid.send_and_receive = streamed  # type: ignore[method-assign]
    up = transport.bytes_up
    second = mean_steps(transport.send(train(2), 10.0))
    assert second == [("ant", 7.0), *ALL_ANSWERS[1:]]
    assert transport.bytes_up - up == 3 * wire.content_size(late_reply.content)


def test_an_impossible_answer_is_refused_and_its_client_named():
    def forger(message: Message) -> RecordDict:
        content = answers_with(2)(message)
        assert isinstance(content, RecordDict)
        content["training"]["steps"] = 10**9
        return content

    answers = dict(make_transport(make_grid(cat=forger)).send(train(), 10.0))
    assert isinstance(answers["cat"], Failure)
    assert answers["cat"].kind == "refused"
    assert answers["cat"].reason.startswith("training.steps is 1000000000; it has to be from 0 to")
    assert mean_step(answers["dog"]) == 3.0


def test_a_point_that_is_not_finite_is_refused():
    answers = dict(make_transport(make_grid(cat=answers_with(math.nan), dog=answers_with(1e9))).send(train(), 10.0))
    reasons = {name: answer.reason for name, answer in answers.items() if isinstance(answer, Failure)}
    assert reasons["cat"].startswith("arrays.point is nan at entry 0")
    assert "from the shared blocks" in reasons["dog"]


def test_a_client_without_a_node_is_unreachable():
    grid = make_grid()
    del grid.clients[12]
    transport = make_transport(grid)
    assert transport.reachable() == ("dog", "ant")  # as the scenario has them
    answers = dict(transport.send(train(), 10.0))
    assert answers["cat"] == Failure("unreachable", "no node is connected for it")
    assert mean_step(answers["dog"]) == 3.0
    grid.clients[12] = answers_with(2)
    assert mean_steps(transport.send(train(), 10.0)) == ALL_ANSWERS


def test_messages_are_sent_again_to_restarted_nodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pending, "RESTART_CHECK", 0.0)
    grid = GridWithStartTimes(make_grid().clients)
    received: list[str] = []

    def forgets(message: Message) -> RecordDict | None:
        """Lose the first message, as a node does that is killed and restarted."""
        if message.metadata.message_id not in received:
            received.append(message.metadata.message_id)
        if grid.pulls == 3:
            grid.started[12] = "2026-01-01T00:01:00"
        return answers_with(2)(message) if message.metadata.message_id != received[0] else None

    grid.clients[12] = forgets
    assert mean_steps(make_transport(grid).send(train(), 10.0)) == ALL_ANSWERS
    assert len(received) == 2
    assert list(grid.sent) == [received[0]], "the first message is given up, and only cat's was sent again"


@pytest.mark.parametrize("both", [False, True])
def test_a_resent_message_fails_only_if_both_replies_are_errors(monkeypatch: pytest.MonkeyPatch, both: bool):
    monkeypatch.setattr(pending, "RESTART_CHECK", 0.0)
    grid = GridWithStartTimes(make_grid().clients)
    received: list[str] = []

    def fails(message: Message) -> RecordDict | Error | None:
        """Answer nothing at first; then fail at one of the two messages, and later at the other one too if `both`."""
        if message.metadata.message_id not in received:
            received.append(message.metadata.message_id)
        grid.started[12] = "2026-01-01T00:01:00"
        if len(received) < 2 or (message.metadata.message_id == received[1] and grid.pulls < 6):
            return None
        return answers_with(2)(message) if message.metadata.message_id == received[1] and not both else Error(2, "lost")

    grid.clients[12] = fails
    answers = dict(make_transport(grid).send(train(), 10.0))
    assert len(received) == 2
    if both:
        assert answers["cat"] == Failure("raised", "lost")
    else:
        assert mean_step(answers["cat"]) == 2.0


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_messages_lost_with_a_killed_superlink_are_resent(fails: int):
    grid = make_grid()
    push, tries = grid.push_messages, iter(range(fails))

    def breaks(messages: Iterable[Message]) -> Iterable[str]:
        if next(tries, None) is not None:
            push(messages)
            raise ObjectPushError("object", 1, "session")
        return push(messages)

    grid.push_messages = breaks  # type: ignore[method-assign]
    answers = list(make_transport(grid).send(train(), 10.0))
    if fails == 3:
        assert [name for name, _ in answers] == ["ant", "cat", "dog"]
        assert {answer.kind for _, answer in answers if isinstance(answer, Failure)} == {"unreachable"}
    else:
        assert mean_steps(answers) == ALL_ANSWERS
        assert len(grid.sent) == 3 * fails, "the messages that were half there are never asked for"


def test_a_message_that_the_grid_does_not_take_is_a_failure():
    grid = make_grid()
    push = grid.push_messages
    grid.push_messages = lambda messages: [None, *list(push(messages))[1:]]  # type: ignore[method-assign, list-item]
    answers = dict(make_transport(grid).send(train(), 10.0))
    assert answers["ant"] == Failure("unreachable", "the message could not be handed to its node")
    assert mean_step(answers["dog"]) == 3.0


def test_answers_may_be_read_partly():
    transport = make_transport(make_grid(streams=True))
    answers = transport.send(train(), 10.0)
    assert next(answers)[0] == "ant"
    answers.close()  # type: ignore[attr-defined]
    assert [name for name, _ in transport.send(train(2), 10.0)] == ["ant", "cat", "dog"]


def test_an_evaluation_is_sent_as_an_evaluate_message():
    def refuses(message: Message) -> Error:
        assert message.metadata.message_type == "evaluate"
        return Error(2, "not today")

    instructions = {"ant": Evaluate(Start("run", 0, SHARED), EvaluationPlan(0))}
    assert list(make_transport(make_grid(ant=refuses)).send(instructions, 10.0)) == [
        ("ant", Failure("raised", "not today"))
    ]


def test_a_round_of_500_clients_takes_less_than_half_a_millisecond_each():
    dogs = SCENARIO.clients[0].model_copy(update={"count": 500})
    scenario = SCENARIO.model_copy(update={"clients": [dogs]})
    shared_blocks = resolve_shared_blocks(scenario)
    nodes = dict(enumerate(shared_blocks.clients, 1))
    codec = Codec(shared_blocks, scenario)
    instructions = {name: Train(Start("run", 1, SHARED), 0.0, 0.1) for name in shared_blocks.clients}
    content = codec.write_answer(instructions["dog-0"], answer_to(instructions["dog-0"], 1.0))
    grid = InMemoryGrid(dict.fromkeys(nodes, lambda _: content), streams=True)
    transport = GridTransport(grid, shared_blocks, scenario, nodes)
    costs = []
    for _ in range(5):
        began = time.process_time()
        answers = list(transport.send(instructions, 60.0))
        costs.append((time.process_time() - began) / len(instructions))
        assert all(isinstance(answer, Trained) for _, answer in answers)
    assert min(costs) < 0.5e-3
