"""The local engine: clients in worker processes, and what becomes of the others when one fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from grpo_fed.engines.local.grid import LocalGrid
from grpo_fed.engines.local.schedule import ChunkSchedule, make_chunks
from grpo_fed.engines.wire.message_factory import RUN, SERVER, make_message
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.engines.workers.fork_server import Worker, is_possible
from grpo_fed.engines.workers.frames import receive, send
from grpo_fed.engines.workers.pool import Job
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario
from tests.support.fake_clients import step_of

ROOT = Path(__file__).parents[2]
KILLED = "was ended by SIGKILL, perhaps for want of memory"
TROUPE = "tests.support.fake_clients:Troupe"

needs_workers = pytest.mark.skipif(not is_possible(), reason="worker processes need Linux")


def scenario_of(clients: int, **settings: Any) -> Scenario:
    plain: dict[str, Any] = {
        "name": "local",
        "method": "fedavg",
        "rounds": 9,
        "steps": 64,
        "policy": {"hidden": [4]},
        "rollout": {"num_envs": 2, "horizon": 32},
        "evaluate": {"episodes": 2},
        "clients": [{"name": "cart", "env": "grpo_fed/CartPole-v1", "count": clients}],
    }
    return Scenario.model_validate(plain | settings)


class Stage:
    """A grid with clients that do nothing, a post to it, and what they have been asked."""

    def __init__(self, folder: Path, clients: int, workers: int, **given: Any) -> None:
        self.scenario = scenario_of(clients)
        self.commons: SharedBlocks = resolve_shared_blocks(self.scenario)
        self.names = self.commons.clients
        self.log = folder / "asked.jsonl"
        self.log.touch()
        told = {"log": str(self.log), **given}
        self.grid = LocalGrid.serving(self.scenario, self.commons, TROUPE, workers, told)
        self.post = GridTransport(self.grid, self.commons, self.scenario, self.grid.nodes)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.grid.close()

    def train(self, number: int, deadline: float | None = 60.0) -> dict[str, Answer | Failure]:
        shared = self.commons.initial.numpy()
        told = {name: Train(Start("run", number, shared), 0.0, 0.5) for name in self.names}
        return dict(self.post.send(told, deadline))

    def asked(self, number: int) -> list[list[str]]:
        """In a round, who was asked together."""
        return [names for other, _, _, *names in self.lines() if other == number]

    def pids(self) -> set[int]:
        return {pid for _, pid, *_ in self.lines()}

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def failed(answers: Mapping[str, Answer | Failure]) -> dict[str, str]:
    return {name: answer.kind for name, answer in answers.items() if isinstance(answer, Failure)}


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_workers)])
def test_every_client_answers_for_itself(tmp_path: Path, workers: int) -> None:
    with Stage(tmp_path, 20, workers) as stage:
        answers = stage.train(1)
        assert list(answers) == sorted(stage.names)
        for name, answer in answers.items():
            assert isinstance(answer, Trained)
            np.testing.assert_array_equal(answer.point, stage.commons.initial.numpy() + np.float32(step_of(name)))
            assert (answer.steps, answer.gain, answer.metrics) == (1, 0.5, {"losses/entropy": 0.125})
        start = Start("run", 1, stage.commons.initial.numpy())
        candidate = start.shared + np.float32(1)
        halves = tuple([0.5] * len(stage.commons.blocks) for _ in range(3))
        trials = tuple(tuple(half) for half in halves)
        measured = dict(stage.post.send({"cart-7": Measure(start, candidate, trials)}, 60))
        assert measured["cart-7"].kl == (sum(trials[0]) * step_of("cart-7"),) * 3  # type: ignore[union-attr]
        played = dict(stage.post.send({"cart-3": Evaluate(start, EvaluationPlan(1))}, 60))
        assert played["cart-3"].played.mean == step_of("cart-3")  # type: ignore[union-attr]


def test_in_one_process_nobody_waits_for_answers_that_nobody_has_asked_for(tmp_path: Path) -> None:
    with Stage(tmp_path, 40, 0) as stage:
        shared = stage.commons.initial.numpy()
        told = {name: Train(Start("run", 1, shared), 0.0, 0.5) for name in stage.names}
        answers = stage.post.send(told, None)
        next(answers)
        assert len(stage.lines()) == 1  # of three chunks


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=needs_workers)])
def test_what_is_shared_is_there_once_for_all(tmp_path: Path, workers: int) -> None:
    with Stage(tmp_path, 3, workers) as stage:
        stage.train(1)
        ((_, _, different, *names),) = stage.lines()
        assert (different, len(names)) == (1, 3)


@needs_workers
@pytest.mark.parametrize("deadline", [None, float("inf"), 1e8])
def test_without_a_deadline_clients_are_waited_for(tmp_path: Path, deadline: float | None) -> None:
    with Stage(tmp_path, 2, 1, seconds=0.1) as stage:
        assert not failed(stage.train(1, deadline))


@needs_workers
def test_chunks_stay_with_their_workers(tmp_path: Path) -> None:
    with Stage(tmp_path, 64, 2, seconds=0.05) as stage:
        for number in (1, 2, 3):
            assert not failed(stage.train(number))
        homes: dict[str, set[int]] = {}
        for _, pid, _, *names in stage.lines():
            homes.setdefault(names[0], set()).add(pid)
        assert len(homes) == 4
        assert len(stage.pids()) == 2
        assert sum(len(pids) > 1 for pids in homes.values()) <= 2  # one that fell behind gave one away


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_workers)])
def test_a_client_that_raises_fails_alone_and_comes_back(tmp_path: Path, workers: int) -> None:
    with Stage(tmp_path, 8, workers, faults={"cart-5": {"2": "raise", "3": "raise"}}) as stage:
        assert not failed(stage.train(1))
        answers = stage.train(2)
        assert failed(answers) == {"cart-5": "raised"}
        assert answers["cart-5"] == Failure("raised", "RuntimeError: cart-5 has had enough")
        assert failed(stage.train(3)) == {"cart-5": "raised"}
        assert not failed(stage.train(4))
        assert not failed(stage.train(5))
        assert sorted(map(sorted, stage.asked(5))) == sorted(map(sorted, stage.asked(1)))
        assert ["cart-5"] in stage.asked(3)  # the others are not asked twice for it
        assert len(stage.asked(3)) == len(stage.asked(1)) + 1


@needs_workers
def test_a_client_whose_process_ends_fails_alone_and_comes_back(tmp_path: Path) -> None:
    with Stage(tmp_path, 6, 2, faults={"cart-1": {"1": "exit"}, "cart-4": {"1": "exit", "2": "exit"}}) as stage:
        answers = stage.train(1)
        assert failed(answers) == {"cart-1": "died", "cart-4": "died"}
        assert answers["cart-1"] == Failure("died", "its process ended with exit code 3")
        assert failed(stage.train(2)) == {"cart-4": "died"}
        assert not failed(stage.train(3))


@needs_workers
def test_a_client_that_hangs_is_late_and_found_within_few_rounds(tmp_path: Path) -> None:
    hangs = {str(number): "hang" for number in (1, 2, 3)}
    with Stage(tmp_path, 8, 2, faults={"cart-0": hangs}) as stage:
        began = time.monotonic()
        mates = ["cart-0", "cart-1", "cart-2", "cart-3"]
        assert failed(stage.train(1, deadline=1.0)) == dict.fromkeys(mates, "late")
        assert failed(stage.train(2, deadline=1.0)) == dict.fromkeys(mates[:2], "late")
        answers = stage.train(3, deadline=1.0)
        assert answers["cart-0"] == Failure("late", "it was still at work, and its process was stopped")
        assert failed(answers) == {"cart-0": "late"}
        assert time.monotonic() - began < 3 * 1.0 + 2
        assert not failed(stage.train(4))
        assert not failed(stage.train(5))
        assert sorted(map(sorted, stage.asked(5))) == sorted(map(sorted, stage.asked(1)))


@needs_workers
def test_who_is_behind_a_client_that_hangs_is_late_but_not_suspected(tmp_path: Path) -> None:
    with Stage(tmp_path, 20, 1, faults={"cart-0": {"1": "hang"}}) as stage:
        answers = stage.train(1, deadline=1.0)
        assert set(failed(answers).values()) == {"late"}
        assert answers["cart-9"] == Failure("late", "its turn did not come in time")
        assert not failed(stage.train(2))
        innocent = next(names for names in stage.asked(2) if "cart-9" in names)
        assert stage.asked(2)[0] == innocent
        assert len(innocent) == 10


@needs_workers
def test_a_worker_that_is_killed_while_it_rests_is_replaced_and_nobody_fails(tmp_path: Path) -> None:
    with Stage(tmp_path, 4, 2) as stage:
        stage.train(1)
        for pid in stage.pids():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_alive(pid))
        assert not failed(stage.train(2))
        assert len(stage.pids()) == 4


@needs_workers
def test_workers_can_lose_what_they_came_from(tmp_path: Path) -> None:
    with Stage(tmp_path, 2, 1, faults={"cart-0": {"2": "exit"}}) as stage:
        stage.train(1)
        (pid,) = stage.pids()
        nursery = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(nursery, signal.SIGKILL)
        wait_until(lambda: not is_alive(nursery))
        answers = stage.train(2)
        assert failed(answers) == {"cart-0": "died"}
        assert not failed(stage.train(3))


@needs_workers
def test_a_worker_that_is_killed_at_work_is_named(tmp_path: Path) -> None:
    with Stage(tmp_path, 2, 2, faults={"cart-1": {"1": "kill"}}) as stage:
        answers = stage.train(1)
        assert isinstance(answers["cart-0"], Trained)
        assert answers["cart-1"] == Failure("died", f"its process {KILLED}")


@needs_workers
def test_who_stops_listening_stops_the_work(tmp_path: Path) -> None:
    with Stage(tmp_path, 2, 2, faults={"cart-0": {"1": "hang"}}) as stage:
        start = Start("run", 1, stage.commons.initial.numpy())
        content = content_of(stage, Train(start, 0.0, 0.5))
        hangs, answers = (stage.grid.create_message(content, "train", node, "") for node in (1, 2))
        replies = stage.grid.send_and_receive([answers, hangs])
        next(replies)
        wait_until(lambda: len(stage.lines()) == 2)
        replies.close()
        (pid,) = {pid for _, pid, _, *names in stage.lines() if names == ["cart-0"]}
        assert not is_alive(pid)


# Processes -----------------------------------------------------------------------------------------------------------


@needs_workers
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_they_work_for(tmp_path: Path, number: signal.Signals) -> None:
    process = start_alone(
        f"""
        faults = {{"cart-0": {{"1": "print"}}, "cart-1": {{"2": "hang"}}}}
        with Stage(Path({str(tmp_path)!r}), 2, 2, faults=faults) as stage:
            stage.train(1)
            print(stage.grid._hands._idle[0]._nursery._process.pid, flush=True)
            stage.train(2)
        """,
    )
    assert process.stdout is not None
    nursery = int(process.stdout.readline())  # what a client prints does not get between
    log = tmp_path / "asked.jsonl"
    wait_until(lambda: [2] in [line[:1] for line in map(json.loads, log.read_text().splitlines())])
    pids = {json.loads(line)[1] for line in log.read_text().splitlines()}
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, complaint = process.communicate(timeout=20)
    for pid in {nursery, *pids}:
        wait_until(lambda pid=pid: not is_alive(pid))
    assert "KeyboardInterrupt" in complaint if number == signal.SIGINT else process.returncode == -number
    assert "cart-0 says hello" in complaint
    assert complaint.count("Traceback") == (number == signal.SIGINT)  # of this process, not of its workers


@needs_workers
def test_a_new_worker_is_there_at_once() -> None:
    Worker().close()
    began = time.perf_counter()
    worker = Worker()
    send(worker.link, {"path": sys.path, "serve": "nowhere:Nobody", "given": None, "chunk": (), "told": {}})
    answer = receive(worker.link)
    assert answer["raised"].startswith("ModuleNotFoundError")
    assert time.perf_counter() - began < 1
    assert worker.close() == f"its process {KILLED}"


# What goes between processes -----------------------------------------------------------------------------------------

A = np.array([1.5, -0.0, np.nan, np.inf], np.float32)
START = Start("run", 3, A, (0, 2))
PLAYED = EvaluationSummary(1.0, 0.5, -2.0, 3.0, 4, 5.5)
SAID: Sequence[Instruction | Answer] = [
    Train(START, 0.1, 0.2),
    Train(START, 0.1, 0.2, True, EvaluationPlan(2, False)),
    Measure(START, A[::-1], ((0.5, 1.0), (0.0, 0.25))),
    Evaluate(Start("run", 0, np.zeros(0, np.float32)), EvaluationPlan(0)),
    Trained(A, 10, 2, -0.5, 0.25, {"losses/kl": 1e-9}, np.zeros(4, np.float32), (0.1, float("inf")), PLAYED),
    Trained(A, 10, 2, float(np.float64(0.1)), 0.25, {"losses/kl": np.float32(0.5)}),  # type: ignore[dict-item]
    Measured((0.1, 1e300)),
    Evaluated(PLAYED),
]


@pytest.mark.parametrize("said", SAID, ids=lambda said: type(said).__name__)
def test_what_is_said_arrives_bit_for_bit(said: Instruction | Answer) -> None:
    near, far = socket.socketpair()
    with near, far:
        send(near, {"told": {"cart": said, "other": said}})
        told = receive(far)["told"]
        assert_same(told["cart"], said)
        assert_same(told["other"], said)


def test_a_hundred_clients_are_sent_one_array() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        start = Start("run", 1, np.ones(10_000, np.float32))
        send(near, {"told": {f"cart-{k}": Train(start, 0, 1) for k in range(100)}}, time.monotonic() + 5)
        assert len(far.recv(1 << 22, socket.MSG_PEEK)) < 100_000
        told = receive(far)["told"]
        assert len({id(one.start.shared) for one in told.values()}) == 1


def test_an_end_that_is_gone_or_slow_is_noticed() -> None:
    near, far = socket.socketpair()
    with near, far:
        with pytest.raises(TimeoutError):
            receive(near, time.monotonic() + 0.05)
        with pytest.raises(TimeoutError):  # nobody reads
            send(near, {"much": np.zeros(10_000_000)}, time.monotonic() + 0.05)
    near, far = socket.socketpair()
    with near:
        far.close()
        with pytest.raises(EOFError):
            receive(near)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for name, value in vars(one).items():
        right = getattr(other, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == right.dtype
            assert value.tobytes() == np.ascontiguousarray(right).tobytes()
        elif isinstance(value, Start | EvaluationPlan | EvaluationSummary):
            assert_same(value, right)
        else:
            assert value == right


def test_our_messages_are_messages_to_flower() -> None:
    # What engines/instruct.py knows of Flower: a message made so goes through Flower's own app and its reply fits.
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
    with Stage(tmp_path, 2, 0) as stage:
        start = Start("run", 1, stage.commons.initial.numpy())
        made = [stage.grid.create_message(content_of(stage, Train(start, 0, 1)), "train", node, "") for node in (1, 2)]
        hello = stage.grid.create_message(RecordDict(), "query.hello", 2, "")
        ids = list(stage.grid.push_messages([*made, hello]))
        assert ids == [message.metadata.message_id for message in [*made, hello]]
        replies = list(stage.grid.pull_messages(ids))
        assert [reply.metadata.reply_to_message_id for reply in replies] == ids
        assert replies[2].content["hello"] == ConfigRecord({"client": "cart-1"})
        assert list(stage.grid.pull_messages(ids)) == []


def test_a_message_that_is_no_instruction_is_refused_by_its_client(tmp_path: Path) -> None:
    with Stage(tmp_path, 2, 0) as stage:
        bad = stage.grid.create_message(RecordDict({"x": ConfigRecord({})}), "train", 1, "")
        (reply,) = stage.grid.send_and_receive([bad])
        assert reply.error.code == 2
        assert (reply.error.reason or "").startswith("InvalidMessageError: ")
        assert stage.lines() == []


def content_of(stage: Stage, one: Instruction) -> RecordDict:
    return stage.grid._codec.write_instruction(one)


# Who is asked with whom ----------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), workers=st.integers(0, 9), most=st.integers(1, 20))
def test_chunks_hold_everyone_once_and_are_small_equal_and_enough(sizes: list[int], workers: int, most: int) -> None:
    fleets = [[f"{fleet}-{k}" for k in range(size)] for fleet, size in enumerate(sizes)]
    chunks = make_chunks(fleets, workers, most)
    assert sorted(name for chunk in chunks for name in chunk) == sorted(name for fleet in fleets for name in fleet)
    assert all(len({name.split("-")[0] for name in chunk}) == 1 for chunk in chunks)
    assert max(map(len, chunks)) <= most
    assert max(map(len, chunks)) <= -(-sum(sizes) // max(1, workers))
    for fleet in range(len(sizes)):
        own = [len(chunk) for chunk in chunks if chunk[0].startswith(f"{fleet}-")]
        assert max(own) - min(own) <= 1


def test_chunks_come_out_even_over_the_workers() -> None:
    names = [f"cart-{k}" for k in range(40)]
    assert [len(chunk) for chunk in make_chunks([names], 2)] == [10, 10, 10, 10]  # not 14, 13, 13
    assert [len(chunk) for chunk in make_chunks([names[:6]], 2)] == [3, 3]
    assert [len(chunk) for chunk in make_chunks([names[:6]], 0)] == [6]
    assert [len(chunk) for chunk in make_chunks([names[:3], names[3:6]], 2)] == [3, 3]


def test_a_group_that_hangs_is_halved_until_it_is_one() -> None:
    names = tuple("abcd")
    rota = ChunkSchedule([names])
    assert list(rota.jobs(names)) == [Job(names, names)]
    rota.failed(Job(names, names))
    assert rota.set_aside == [("a", "b"), ("c", "d")]
    assert list(rota.jobs("abd")) == [Job(names, ("a", "b"), last=True), Job(names, ("d",), last=True)]
    rota.answered(Job(names, ("d",)))
    rota.failed(Job(names, ("a", "b")))
    assert rota.set_aside == [("c",), ("a",), ("b",)]
    assert list(ChunkSchedule([names], rota.set_aside).jobs(names)) == list(rota.jobs(names))
    for name in "abc":
        rota.answered(Job(names, (name,)))
    assert rota.set_aside == []


# Helpers -------------------------------------------------------------------------------------------------------------


def start_alone(code: str) -> subprocess.Popen[str]:
    """A process of its own and the leader of a group."""
    lines = "\n".join(line[8:] for line in code.splitlines())
    listen = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # who starts us may ignore it
    code = f"{listen}\nfrom pathlib import Path\nfrom tests.engines.test_local import Stage\n{lines}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.01)
