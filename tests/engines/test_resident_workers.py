"""A client's workers in a resident node: they answer like the message's own process, and survive failures."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from grpo_fed.engines.flower.node import NodeHandler
from grpo_fed.engines.resident import workers as workers_module
from grpo_fed.engines.resident.workers import ClientWorkers, Outcome, ReceivedMessage, read_thread_count
from grpo_fed.engines.wire import Codec, write_shared_blocks
from grpo_fed.engines.wire.flower_private import pack, unpack
from grpo_fed.engines.workers.fork_server import is_possible, preload
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario

pytestmark = pytest.mark.skipif(not is_possible(), reason="worker processes need Linux")

TEXT = """
name = "warm"
rounds = 9
steps = 64
policy = {{ hidden = [8] }}
rollout = {{ num_envs = 4, horizon = 16 }}
objective = {{ epochs = 2, minibatches = 2 }}
[[clients]]
name = "cart"
env = "tests.support.failing_envs:PidLogging-v0"
kwargs = {{ pid_file = {pid_file}, when = {when}, how = "{how}" }}
"""
RUN = 7


@pytest.fixture(autouse=True, scope="module")
def fork_server() -> None:
    preload()


def until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Return whether any thread of a process is alive."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if thread.read_text().rpartition(")")[2].split()[0] != "Z":
                return True
        except OSError:
            continue
    return False


class Client:
    """A client's workers, and the messages that a server would send it."""

    def __init__(self, folder: Path, how: str = "raise") -> None:
        self.when, self.pid_file = folder / "when", folder / "pids"
        self.text = TEXT.format(pid_file=repr(str(self.pid_file)), when=repr(str(self.when)), how=how)
        scenario = Scenario.loads(self.text)
        self.shared_blocks = resolve_shared_blocks(scenario)
        self.codec = Codec(self.shared_blocks, scenario)
        self.pid_file.unlink(missing_ok=True)  # resolving the shared blocks made an environment in this process
        self.config = {"client": "cart", "state": str(folder / "state")}
        self.outcomes: queue.SimpleQueue[tuple[ReceivedMessage, Outcome]] = queue.SimpleQueue()
        self.workers = ClientWorkers(self.config, lambda task, outcome: self.outcomes.put((task, outcome)))
        self.numbers = count()

    def task(self, round: int, run: int = RUN) -> tuple[Train, ReceivedMessage]:
        train = Train(Start(f"run-{run}", round, self.shared_blocks.initial.numpy()), (round - 1) / 9, round / 9)
        content = self.codec.write_instruction(train)
        content["shared_blocks"] = write_shared_blocks(self.shared_blocks)
        return train, ReceivedMessage(f"task-{next(self.numbers)}", run, "train", self.text, pack(content))

    def begin(self, round: int, run: int = RUN) -> ReceivedMessage:
        _, task = self.task(round, run)
        self.workers.begin(task)
        return task

    def outcome(self) -> Outcome:
        return self.outcomes.get(timeout=60)[1]

    def read(self, train: Train, content: np.ndarray | None) -> np.ndarray:
        assert content is not None
        answer = self.codec.read_answer(train, unpack(content))
        assert isinstance(answer, Trained)
        return answer.point

    def train(self, round: int, run: int = RUN) -> np.ndarray:
        train, task = self.task(round, run)
        self.workers.begin(task)
        return self.read(train, self.outcome().content)

    @property
    def processes(self) -> set[int]:
        """The processes in which the client's environments were made."""
        return {int(line) for line in self.pid_file.read_text().split()} if self.pid_file.exists() else set()


@pytest.fixture
def make_client(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(how: str = "raise") -> Client:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Client(folder, how))
        return made[-1]

    yield make
    for client in made:
        client.workers.close()


def test_a_worker_answers_like_the_messages_own_process(make_client: Callable[..., Client]):
    warm, cold = make_client(), make_client()
    points = [warm.train(round) for round in (1, 2, 3)]
    (pid,) = warm.processes
    assert pid != os.getpid()
    node = NodeHandler()
    for round, point in zip((1, 2, 3), points, strict=True):
        train, task = cold.task(round)
        answer = node.answer("train", unpack(task.content), task.scenario, cold.config)
        np.testing.assert_array_equal(cold.read(train, pack(answer)), point)
    node.close()


@pytest.mark.parametrize("module", ["grpo_fed.engines.resident.host", "grpo_fed.engines.resident.client"])
def test_a_resident_node_imports_no_torch(module: str):
    code = f"import sys, {module}; sys.exit(str(sorted({{'torch', 'gymnasium', 'pydantic'}} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_a_clients_error_is_reported_by_its_place_and_its_worker_stays(make_client: Callable[..., Client]):
    client = make_client()
    client.train(1)
    client.when.touch()
    client.begin(2)
    raised = client.outcome().raised
    assert raised.startswith("WithheldError: TaskError at grpo_fed/")
    assert "it will not move" not in raised
    assert "RuntimeError: it will not move" in (client.when.parent / "state" / "errors" / "cart.log").read_text()
    client.when.unlink()
    client.train(2)
    assert len(client.processes) == 1


def test_a_client_that_ends_its_process_fails_once(make_client: Callable[..., Client]):
    client = make_client("exit")
    client.train(1)
    client.when.touch()
    client.begin(2)
    assert client.outcome().died == "its process ended with exit code 5"
    client.when.unlink()
    client.train(2)
    assert len(client.processes) == 2


def test_a_worker_that_is_killed_is_reported_at_once(make_client: Callable[..., Client]):
    client = make_client("wait")
    client.train(1)
    client.when.touch()
    client.begin(2)
    time.sleep(0.3)
    (pid,) = client.processes
    os.kill(pid, signal.SIGKILL)
    assert "SIGKILL" in client.outcome().died


def test_a_cancelled_task_takes_its_worker_with_it(make_client: Callable[..., Client]):
    client = make_client("hang")
    client.train(1)
    client.when.touch()
    hanging = client.begin(2)
    (pid,) = client.processes
    time.sleep(0.5)
    assert client.workers.busy == [hanging.id]
    client.when.unlink()
    client.workers.cancel(hanging.id)
    client.train(3)
    assert client.outcomes.empty()
    until(lambda: not is_alive(pid))


def test_tasks_of_a_run_are_done_one_after_the_other_and_each_once(make_client: Callable[..., Client]):
    client = make_client("wait")
    client.train(1)
    client.when.touch()
    first = client.begin(2)
    client.workers.begin(first)
    second = client.begin(3)
    time.sleep(0.3)
    assert client.workers.busy == [first.id, second.id]
    client.when.unlink()
    assert [client.outcomes.get(timeout=60)[0].id for _ in range(2)] == [first.id, second.id]
    assert len(client.processes) == 1
    assert client.outcomes.empty()


def test_an_idle_worker_that_was_killed_is_replaced(make_client: Callable[..., Client]):
    client = make_client()
    client.train(1)
    (pid,) = client.processes
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid))
    client.train(2)
    assert len(client.processes) == 2


@pytest.mark.parametrize(("value", "threads"), [("", 1), ("4,2", 4), ("0", 1), ("3", 3)])
def test_any_value_of_omp_num_threads_is_accepted(value: str, threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert read_thread_count() == threads


def test_a_new_run_replaces_a_clients_idle_worker(make_client: Callable[..., Client]):
    client = make_client()
    client.train(1)
    (pid,) = client.processes
    client.train(1, run=RUN + 1)
    assert len(client.processes) == 2
    until(lambda: not is_alive(pid))
    client.train(2)  # the client's state is on the disk
    assert len(client.processes) == 3


def test_an_idle_worker_is_ended_after_a_while(make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch):
    client = make_client()
    client.train(1)
    (pid,) = client.processes
    client.workers.end_idle()
    assert is_alive(pid)
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", 0.0)
    client.workers.end_idle()
    until(lambda: not is_alive(pid))


def test_a_client_is_answered_for_in_this_process_where_workers_are_impossible(
    make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workers_module, "is_possible", lambda: False)
    client = make_client()
    client.train(1)
    assert client.processes == {os.getpid()}
