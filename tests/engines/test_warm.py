"""The warm server beside a client's node: it answers like the message's own process, and survives failures."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from grpo_fed.engines.flower import warm
from grpo_fed.engines.flower.forward import WARM_SOCKET, MessageForwarder
from grpo_fed.engines.wire import Codec, write_shared_blocks
from grpo_fed.engines.wire.grids import WorkerDiedError, to_failure
from grpo_fed.engines.wire.packing import pack
from grpo_fed.engines.workers.fork_server import is_possible
from grpo_fed.engines.workers.frames import send
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from tests.support.in_memory_grid import enter_run

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


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(monkeypatch)


@contextmanager
def running_server(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a warm server in a folder; gives its process and the path of its socket."""
    ((_, path),) = warm.make_node_environment(folder).items()
    ((_, command),) = warm.make_start_commands(folder).items()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(Path(path).exists)
        yield process, path
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """One warm server for all tests: it takes seconds to start."""
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        yield server


@pytest.fixture
def server(
    shared_server: tuple[subprocess.Popen[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> subprocess.Popen[bytes]:
    """The warm server's process, with the environment variable that names its socket."""
    process, path = shared_server
    monkeypatch.setenv(WARM_SOCKET, path)
    return process


def until(is_true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


class Client:
    """A client's node, and the messages that a server would send it."""

    def __init__(self, folder: Path, how: str = "raise", run: int = RUN) -> None:
        self.folder, self.run = folder, run
        self.when, self.pid_file = folder / "when", folder / "pids"
        text = TEXT.format(pid_file=repr(str(self.pid_file)), when=repr(str(self.when)), how=how)
        scenario = Scenario.loads(text)
        self.shared_blocks = resolve_shared_blocks(scenario)
        self.codec = Codec(self.shared_blocks, scenario)
        self.pid_file.unlink(missing_ok=True)  # resolving the shared blocks made an environment in this process
        self.context = Context(
            run, 2, {"client": "cart", "state": str(folder / "state")}, RecordDict(), {"scenario": text}
        )
        self.forwarder = MessageForwarder()

    def message(self, round: int) -> tuple[Train, Message]:
        start = Start(f"run-{self.run}", round, self.shared_blocks.initial.numpy())
        train = Train(start, (round - 1) / 9, round / 9)
        content = self.codec.write_instruction(train)
        content["shared_blocks"] = write_shared_blocks(self.shared_blocks)
        return train, Message(content, 2, "train")

    def request(self, message: Message) -> dict[str, object]:
        """What a forwarder sends to the warm server."""
        config, scenario = self.context.node_config, self.context.run_config["scenario"]
        return {"kind": "train", "scenario": scenario, "config": config, "content": pack(message.content), "threads": 1}

    def train(self, round: int) -> np.ndarray:
        train, message = self.message(round)
        answer = self.codec.read_answer(train, self.forwarder.answer(message, self.context))
        assert isinstance(answer, Trained)
        return answer.point

    @property
    def processes(self) -> set[int]:
        """The processes in which the client's environments were made."""
        return {int(line) for line in self.pid_file.read_text().split()} if self.pid_file.exists() else set()


def is_alive(pid: int) -> bool:
    """Return whether any thread of a process is alive."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if thread.read_text().rpartition(")")[2].split()[0] != "Z":
                return True
        except OSError:
            continue
    return False


def test_the_warm_server_answers_like_the_messages_own_process(
    server: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    client = Client(tmp_path / "a")
    points = [client.train(round) for round in (1, 2, 3)]
    assert client.forwarder.node is None
    (pid,) = client.processes
    assert pid not in (os.getpid(), server.pid)
    monkeypatch.delenv(WARM_SOCKET)
    cold = Client(tmp_path / "b")
    np.testing.assert_array_equal([cold.train(round) for round in (1, 2, 3)], points)
    assert cold.processes == {os.getpid()}
    assert cold.forwarder.node is not None
    cold.forwarder.node.close()


@pytest.mark.parametrize("module", ["clients.app", "grpo_fed.engines.flower.warm"])
def test_forwarding_a_message_imports_no_torch(module: str):
    code = f"import sys, {module}; sys.exit(str(sorted({{'torch', 'gymnasium', 'pydantic'}} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_a_clients_error_is_raised_by_name_and_its_worker_stays(server: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path)
    client.train(1)
    client.when.touch()
    with pytest.raises(Exception, match="it will not move") as raised:
        client.train(2)
    assert type(raised.value).__name__ == "TaskError"
    client.when.unlink()
    client.train(2)
    assert len(client.processes) == 1


def test_a_client_that_ends_its_process_fails_once(server: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path, "exit")
    client.train(1)
    client.when.touch()
    with pytest.raises(WorkerDiedError, match="exit code 5") as died:
        client.train(2)
    client.when.unlink()
    client.train(2)
    assert len(client.processes) == 2
    error = type("Error", (), {"code": 2, "reason": f"{type(died.value)}:<'{died.value}'>"})  # as Flower writes it
    failure = to_failure(error)  # type: ignore[arg-type]
    assert (failure.kind, failure.reason) == ("died", "its process ended with exit code 5")


def test_the_next_message_replaces_one_that_hangs(server: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path, "hang")
    client.train(1)
    client.when.touch()
    ended: list[BaseException] = []

    def hang() -> None:
        try:
            client.train(2)
        except WorkerDiedError as error:
            ended.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    (pid,) = client.processes
    time.sleep(0.5)
    assert thread.is_alive()
    client.when.unlink()
    client.train(3)
    thread.join(30)
    assert [str(error) for error in ended] == ["the client's next message came before it had answered"]
    until(lambda: not is_alive(pid))


def test_a_message_that_is_sent_twice_is_done_once(server: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path, "wait")
    client.train(1)
    client.when.touch()
    points: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: points.append(client.train(2))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    assert not points
    client.when.unlink()
    for thread in threads:
        thread.join(30)
    np.testing.assert_array_equal(*points)
    assert len(client.processes) == 1


def test_an_idle_worker_that_was_killed_is_replaced(server: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path)
    client.train(1)
    (pid,) = client.processes
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid))
    client.train(2)
    assert len(client.processes) == 2


@pytest.mark.parametrize("threads", ["", "4,2", "0"])
def test_any_value_of_omp_num_threads_is_accepted(
    threads: str, server: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    client = Client(tmp_path)
    client.train(1)
    assert client.forwarder.node is None


def test_a_worker_ends_when_no_process_waits_for_its_answer(server: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path, "hang")
    client.train(1)
    (pid,) = client.processes
    client.when.touch()
    _, message = client.message(2)
    request = client.request(message)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(os.environ[WARM_SOCKET])
        send(link, {"run": RUN, "path": sys.path, "request": request})
        time.sleep(0.3)
        assert is_alive(pid)
    until(lambda: not is_alive(pid))


def test_a_new_run_replaces_a_clients_idle_worker(server: subprocess.Popen[bytes], tmp_path: Path):
    first, second = Client(tmp_path), Client(tmp_path, run=RUN + 1)
    second.context.node_config = dict(first.context.node_config)
    first.train(1)
    (pid,) = first.processes
    second.train(1)
    assert len(first.processes) == 2
    until(lambda: not is_alive(pid))
    first.train(2)  # the client's state is on the disk
    assert len(first.processes) == 3


def test_without_a_warm_server_the_messages_process_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    client = Client(tmp_path)
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as (process, path):
        monkeypatch.setenv(WARM_SOCKET, path)
        client.train(1)
        (pid,) = client.processes
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not is_alive(pid))
        client.train(2)
    assert client.forwarder.node is not None
    assert client.processes == {pid, os.getpid()}
    client.forwarder.node.close()


def test_an_idle_worker_is_ended_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    warm_server, client = warm.WarmServer(), Client(tmp_path)
    _, message = client.message(1)
    request = client.request(message)
    link, server_end = socket.socketpair()
    with link:
        send(link, {"run": RUN, "path": sys.path, "request": request})
        warm_server.serve(server_end)
    (pid,) = client.processes
    warm_server.end_idle()
    assert is_alive(pid)
    monkeypatch.setattr(warm, "IDLE_SECONDS", 0.0)
    warm_server.end_idle()
    until(lambda: not is_alive(pid))


def test_a_socket_path_that_is_too_long_means_no_warm_server(tmp_path: Path):
    deep = tmp_path / ("x" * 120)
    assert warm.make_node_environment(deep) == warm.make_start_commands(deep) == {}
