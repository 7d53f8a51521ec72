"""The local grid: every client is answered for, also when another one fails, and Flower's interface is as Flower's."""

import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from grpo_fed.engines.wire.flower_private import RUN, SERVER, make_message
from grpo_fed.engines.workers.fork_server import Worker, is_possible
from grpo_fed.federation.messages import Evaluate, EvaluationPlan, Measure, Train, Trained
from grpo_fed.runs.records import Failure
from tests.support.fake_clients import step_of
from tests.support.fake_federation import FakeFederation, failures, partition

KILLED = "was ended by SIGKILL, perhaps because memory ran out"

needs_workers = pytest.mark.skipif(not is_possible(), reason="worker processes need Linux")


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_workers)])
def test_every_client_gives_its_own_answer(tmp_path: Path, workers: int) -> None:
    with FakeFederation(tmp_path, 20, workers) as fake:
        replies = fake.train(1)
        assert list(replies) == sorted(fake.names)
        for name, reply in replies.items():
            assert isinstance(reply, Trained)
            np.testing.assert_array_equal(reply.point, fake.shared_blocks.initial.numpy() + np.float32(step_of(name)))
            assert (reply.steps, reply.gain, reply.metrics) == (1, 0.5, {"losses/entropy": 0.125})
        start = fake.start(1)
        candidate = start.shared + np.float32(1)
        equal = [[0.5] * len(fake.shared_blocks.blocks) for _ in range(3)]
        fractions = tuple(tuple(of_blocks) for of_blocks in equal)
        measured = dict(fake.transport.send({"cart-7": Measure(start, candidate, fractions)}, 60))
        assert measured["cart-7"].kl == (sum(fractions[0]) * step_of("cart-7"),) * 3  # type: ignore[union-attr]
        evaluated = dict(fake.transport.send({"cart-3": Evaluate(start, EvaluationPlan(1))}, 60))
        assert evaluated["cart-3"].summary.mean == step_of("cart-3")  # type: ignore[union-attr]


def test_in_one_process_jobs_run_only_when_their_answers_are_read(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 40, 0) as fake:
        start = fake.start(1)
        replies = fake.transport.send({name: Train(start, 0.0, 0.5) for name in fake.names}, None)
        next(replies)
        assert len(fake.calls()) == 1  # of three chunks


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=needs_workers)])
def test_clients_of_a_job_share_one_array_of_shared_blocks(tmp_path: Path, workers: int) -> None:
    with FakeFederation(tmp_path, 3, workers) as fake:
        fake.train(1)
        ((_, _, arrays, *names),) = fake.calls()
        assert (arrays, len(names)) == (1, 3)


@needs_workers
@pytest.mark.parametrize("deadline", [None, float("inf"), 1e8])
def test_a_run_without_a_near_deadline_waits_for_its_clients(tmp_path: Path, deadline: float | None) -> None:
    with FakeFederation(tmp_path, 2, 1, seconds=0.1) as fake:
        assert not failures(fake.train(1, deadline))


@needs_workers
def test_chunks_stay_with_their_workers(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 64, 2, seconds=0.05) as fake:
        for round in (1, 2, 3):
            assert not failures(fake.train(round))
        pids_of_chunk: dict[str, set[int]] = {}
        for _, pid, _, *names in fake.calls():
            pids_of_chunk.setdefault(names[0], set()).add(pid)
        assert len(pids_of_chunk) == 4
        assert len(fake.pids()) == 2
        assert sum(len(pids) > 1 for pids in pids_of_chunk.values()) <= 2  # a worker that falls behind gives one away


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_workers)])
def test_a_client_that_raises_fails_alone_and_rejoins_its_chunk(tmp_path: Path, workers: int) -> None:
    with FakeFederation(tmp_path, 8, workers, faults={"cart-5": {"2": "raise", "3": "raise"}}) as fake:
        assert not failures(fake.train(1))
        replies = fake.train(2)
        assert failures(replies) == {"cart-5": "raised"}
        assert replies["cart-5"] == Failure("raised", "RuntimeError: cart-5 fails on request")
        assert failures(fake.train(3)) == {"cart-5": "raised"}
        assert not failures(fake.train(4))
        assert not failures(fake.train(5))
        assert partition(fake.jobs(5)) == partition(fake.jobs(1))
        assert ["cart-5"] in fake.jobs(3)  # the others are not asked twice because of it
        assert len(fake.jobs(3)) == len(fake.jobs(1)) + 1


@needs_workers
def test_a_client_whose_process_ends_fails_alone(tmp_path: Path) -> None:
    faults = {"cart-1": {"1": "exit"}, "cart-4": {"1": "exit", "2": "exit"}}
    with FakeFederation(tmp_path, 6, 2, faults=faults) as fake:
        replies = fake.train(1)
        assert failures(replies) == {"cart-1": "died", "cart-4": "died"}
        assert replies["cart-1"] == Failure("died", "its process ended with exit code 3")
        assert failures(fake.train(2)) == {"cart-4": "died"}
        assert not failures(fake.train(3))


@needs_workers
def test_a_client_that_hangs_is_isolated_within_a_few_rounds(tmp_path: Path) -> None:
    hangs = {str(round): "hang" for round in (1, 2, 3)}
    Worker().close()  # the fork server has imported everything now, which takes longer than the deadline
    with FakeFederation(tmp_path, 8, 2, faults={"cart-0": hangs}) as fake:
        began = time.monotonic()
        chunk = ["cart-0", "cart-1", "cart-2", "cart-3"]
        assert failures(fake.train(1, deadline=1.0)) == dict.fromkeys(chunk, "late")
        assert failures(fake.train(2, deadline=1.0)) == dict.fromkeys(chunk[:2], "late")
        replies = fake.train(3, deadline=1.0)
        reason = "it had not answered by the deadline, and its process was stopped"
        assert replies["cart-0"] == Failure("late", reason)
        assert failures(replies) == {"cart-0": "late"}
        assert time.monotonic() - began < 3 * 1.0 + 2
        assert not failures(fake.train(4))
        assert not failures(fake.train(5))
        assert partition(fake.jobs(5)) == partition(fake.jobs(1))


@needs_workers
def test_clients_queued_behind_one_that_hangs_stay_in_their_chunk(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 20, 1, faults={"cart-0": {"1": "hang"}}) as fake:
        replies = fake.train(1, deadline=1.0)
        assert set(failures(replies).values()) == {"late"}
        assert replies["cart-9"] == Failure("late", "its turn did not come in time")
        assert not failures(fake.train(2))
        queued = next(names for names in fake.jobs(2) if "cart-9" in names)
        assert fake.jobs(2)[0] == queued
        assert len(queued) == 10


@needs_workers
def test_a_worker_that_is_killed_at_work_fails_its_clients(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 2, 2, faults={"cart-1": {"1": "kill"}}) as fake:
        replies = fake.train(1)
        assert isinstance(replies["cart-0"], Trained)
        assert replies["cart-1"] == Failure("died", f"its process {KILLED}")


# Flower's interface --------------------------------------------------------------------------------------------------


def test_messages_of_our_factory_pass_through_a_flower_app() -> None:
    # What engines/wire/flower_private.py assumes of Flower: such a message goes through an app, and its reply fits.
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    first, second = (make_message(RecordDict(), "train", node, "7", ttl=60) for node in (1, 2))
    assert first.metadata.message_id != second.metadata.message_id
    context = Context(RUN, 1, {}, RecordDict(), {})
    reply = app(first, context)
    assert reply.metadata.reply_to_message_id == first.metadata.message_id
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (1, SERVER)
    assert (reply.metadata.message_type, reply.metadata.group_id) == ("train", "7")
    assert 59 < reply.metadata.ttl <= 60


def test_messages_can_be_pushed_and_pulled(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 2, 0) as fake:
        content = fake.codec.write_instruction(Train(fake.start(1), 0, 1))
        messages = [fake.grid.create_message(content, "train", node, "") for node in (1, 2)]
        hello = fake.grid.create_message(RecordDict(), "query.hello", 2, "")
        ids = list(fake.grid.push_messages([*messages, hello]))
        assert ids == [message.metadata.message_id for message in [*messages, hello]]
        replies = list(fake.grid.pull_messages(ids))
        assert [reply.metadata.reply_to_message_id for reply in replies] == ids
        assert replies[2].content["hello"] == ConfigRecord({"client": "cart-1"})
        assert list(fake.grid.pull_messages(ids)) == []


def test_a_message_without_an_instruction_is_refused(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 2, 0) as fake:
        invalid = fake.grid.create_message(RecordDict({"x": ConfigRecord({})}), "train", 1, "")
        (reply,) = fake.grid.send_and_receive([invalid])
        assert reply.error.code == 2
        assert (reply.error.reason or "").startswith("InvalidMessageError: ")
        assert fake.calls() == []
