"""What a client's machine keeps warm between messages, in a process of its own, and what happens when one fails."""

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

from grpo_fed.engines.flower import warm as hearth
from grpo_fed.engines.flower.forward import WARM_SOCKET, MessageForwarder
from grpo_fed.engines.wire import Codec, write_shared_blocks
from grpo_fed.engines.wire.grids import WorkerDiedError, failure_of
from grpo_fed.engines.wire.packing import pack
from grpo_fed.engines.workers import fork_server as worker
from grpo_fed.engines.workers.frames import send
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from tests.support.in_memory_grid import enter_run

pytestmark = pytest.mark.skipif(not worker.is_possible(), reason="worker processes need Linux")

TEXT = """
name = "warm"
rounds = 9
steps = 64
policy = {{ hidden = [8] }}
rollout = {{ num_envs = 4, horizon = 16 }}
objective = {{ epochs = 2, minibatches = 2 }}
[[clients]]
name = "cart"
env = "tests.support.failing_envs:Signed-v0"
kwargs = {{ book = {book}, when = {when}, how = "{how}" }}
"""
RUN = 7


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(monkeypatch)


@contextmanager
def burning(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A hearth, and where its socket is."""
    ((_, place),) = hearth.worker_environment(folder).items()
    ((_, command),) = hearth.start_commands(folder).items()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(Path(place).exists)
        yield process, place
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with tempfile.TemporaryDirectory() as folder, burning(Path(folder)) as found:
        yield found


@pytest.fixture
def place(one_for_all: tuple[subprocess.Popen[bytes], str], monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """One that is there."""
    process, socket_ = one_for_all
    monkeypatch.setenv(WARM_SOCKET, socket_)
    return process


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


class Client:
    """A client's node, and the messages that a server would send it."""

    def __init__(self, folder: Path, how: str = "raise", run: int = RUN) -> None:
        self.folder, self.run = folder, run
        self.when, self.book = folder / "when", folder / "book"
        text = TEXT.format(book=repr(str(self.book)), when=repr(str(self.when)), how=how)
        scenario = Scenario.loads(text)
        self.commons = resolve_shared_blocks(scenario)
        self.wire = Codec(self.commons, scenario)
        self.book.unlink(missing_ok=True)  # the test itself looked at the task
        self.context = Context(
            run, 2, {"client": "cart", "state": str(folder / "state")}, RecordDict(), {"scenario": text}
        )
        self.messenger = MessageForwarder()

    def told(self, round: int) -> tuple[Train, Message]:
        start = Start(f"run-{self.run}", round, self.commons.initial.numpy())
        train = Train(start, (round - 1) / 9, round / 9)
        content = self.wire.write_instruction(train)
        content["shared_blocks"] = write_shared_blocks(self.commons)
        return train, Message(content, 2, "train")

    def train(self, round: int) -> np.ndarray:
        train, message = self.told(round)
        answer = self.wire.read_answer(train, self.messenger.answer(message, self.context))
        assert isinstance(answer, Trained)
        return answer.point

    @property
    def signed(self) -> set[int]:
        """The processes in which its environments were made."""
        return {int(line) for line in self.book.read_text().split()} if self.book.exists() else set()


def is_there(pid: int) -> bool:
    """Whether any of its threads is."""
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if thread.read_text().rpartition(")")[2].split()[0] != "Z":
                return True
        except OSError:
            continue
    return False


def test_it_answers_as_the_process_itself_would_and_stays(
    place: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    warm = Client(tmp_path / "a")
    found = [warm.train(round) for round in (1, 2, 3)]
    assert warm.messenger.node is None
    (pid,) = warm.signed
    assert pid not in (os.getpid(), place.pid)
    monkeypatch.delenv(WARM_SOCKET)
    cold = Client(tmp_path / "b")
    np.testing.assert_array_equal([cold.train(round) for round in (1, 2, 3)], found)
    assert cold.signed == {os.getpid()}
    assert cold.messenger.node is not None
    cold.messenger.node.close()


def test_who_hands_a_message_on_needs_no_torch():
    code = "import sys, clients.app; sys.exit(str(sorted({'torch', 'gymnasium', 'pydantic'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_what_a_client_raises_is_raised_by_name_and_its_worker_goes_on(place: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path)
    client.train(1)
    client.when.touch()
    with pytest.raises(Exception, match="it will not move") as raised:
        client.train(2)
    assert type(raised.value).__name__ == "TaskError"
    client.when.unlink()
    client.train(2)
    assert len(client.signed) == 1


def test_a_client_that_ends_its_process_says_so_at_once_and_the_next_message_is_answered(
    place: subprocess.Popen[bytes], tmp_path: Path
):
    client = Client(tmp_path, "exit")
    client.train(1)
    client.when.touch()
    with pytest.raises(WorkerDiedError, match="exit code 5") as died:
        client.train(2)
    client.when.unlink()
    client.train(2)
    assert len(client.signed) == 2
    flower = type("Error", (), {"code": 2, "reason": f"{type(died.value)}:<'{died.value}'>"})  # as it writes it
    failure = failure_of(flower)  # type: ignore[arg-type]
    assert (failure.kind, failure.reason) == ("died", "its process ended with exit code 5")


def test_the_next_message_takes_the_place_of_one_that_hangs(place: subprocess.Popen[bytes], tmp_path: Path):
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
    (first,) = client.signed
    time.sleep(0.5)
    assert thread.is_alive()
    client.when.unlink()
    client.train(3)
    thread.join(30)
    assert [str(one) for one in ended] == ["the client's next message came before it had answered"]
    until(lambda: not is_there(first))


def test_a_message_that_is_told_twice_is_done_once(place: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path, "wait")
    client.train(1)
    client.when.touch()
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(client.train(2))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    assert not found
    client.when.unlink()
    for thread in threads:
        thread.join(30)
    np.testing.assert_array_equal(*found)
    assert len(client.signed) == 1


def test_a_worker_that_was_killed_while_it_had_nothing_to_do_is_not_missed(
    place: subprocess.Popen[bytes], tmp_path: Path
):
    client = Client(tmp_path)
    client.train(1)
    (pid,) = client.signed
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_there(pid))
    client.train(2)
    assert len(client.signed) == 2


@pytest.mark.parametrize("threads", ["", "4,2", "0"])
def test_whatever_is_said_of_threads_a_message_is_answered(
    threads: str, place: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    client = Client(tmp_path)
    client.train(1)
    assert client.messenger.node is None


def test_a_worker_ends_when_nobody_waits_for_its_answer(place: subprocess.Popen[bytes], tmp_path: Path):
    client = Client(tmp_path, "hang")
    client.train(1)
    (pid,) = client.signed
    client.when.touch()
    _, message = client.told(2)
    told = {"kind": "train", "text": client.context.run_config["scenario"], "config": client.context.node_config}
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(os.environ[WARM_SOCKET])
        question = {**told, "content": pack(message.content), "threads": 1}
        send(link, {"run": RUN, "path": sys.path, "told": question})
        time.sleep(0.3)
        assert is_there(pid)
    until(lambda: not is_there(pid))


def test_each_run_has_a_worker_and_an_idle_one_makes_room_for_the_next(place: subprocess.Popen[bytes], tmp_path: Path):
    one, two = Client(tmp_path), Client(tmp_path, run=RUN + 1)
    two.context.node_config = dict(one.context.node_config)
    one.train(1)
    (first,) = one.signed
    two.train(1)
    assert len(one.signed) == 2
    until(lambda: not is_there(first))
    one.train(2)  # what it remembers lies on the disk
    assert len(one.signed) == 3


def test_where_it_is_gone_the_messages_process_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    client = Client(tmp_path)
    with tempfile.TemporaryDirectory() as folder, burning(Path(folder)) as (process, socket_):
        monkeypatch.setenv(WARM_SOCKET, socket_)
        client.train(1)
        (pid,) = client.signed
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not is_there(pid))
        client.train(2)
    assert client.messenger.node is not None
    assert client.signed == {pid, os.getpid()}
    client.messenger.node.close()


def test_a_worker_with_nothing_to_do_is_let_go_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    at, client = hearth.WarmServer(), Client(tmp_path)
    _, message = client.told(1)
    told = {"kind": "train", "text": client.context.run_config["scenario"], "config": client.context.node_config}
    ours, theirs = socket.socketpair()
    with ours:
        send(ours, {"run": RUN, "path": sys.path, "told": {**told, "content": pack(message.content), "threads": 1}})
        at.serve(theirs)
    (pid,) = client.signed
    at.let_go()
    assert is_there(pid)
    monkeypatch.setattr(hearth, "COLD", 0.0)
    at.let_go()
    until(lambda: not is_there(pid))


def test_a_socket_whose_path_is_too_long_is_done_without(tmp_path: Path):
    deep = tmp_path / ("x" * 120)
    assert hearth.worker_environment(deep) == hearth.start_commands(deep) == {}
