"""Worker processes: they are replaced when they die, end with the process that uses them, and receive what is sent."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fed.engines.workers.fork_server import Worker, is_possible
from grpo_fed.engines.workers.frames import make_request, receive, send
from grpo_fed.engines.workers.output import PrintLimit
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
from tests.support.fake_federation import FakeFederation, failures

ROOT = Path(__file__).parents[2]

needs_workers = pytest.mark.skipif(not is_possible(), reason="worker processes need Linux")


# Processes -----------------------------------------------------------------------------------------------------------


@needs_workers
def test_an_idle_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 4, 2) as fake:
        fake.train(1)
        for pid in fake.pids():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: not is_alive(pid))
        assert not failures(fake.train(2))
        assert len(fake.pids()) == 4


@needs_workers
def test_a_fork_server_that_is_killed_is_replaced(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 2, 1, faults={"cart-0": {"2": "exit"}}) as fake:
        fake.train(1)
        (pid,) = fake.pids()
        fork_server = parent_of(pid)
        os.kill(fork_server, signal.SIGKILL)
        wait_until(lambda: not is_alive(fork_server))
        replies = fake.train(2)
        assert failures(replies) == {"cart-0": "died"}
        assert not failures(fake.train(3))


@needs_workers
def test_busy_workers_are_killed_when_their_answers_are_not_read(tmp_path: Path) -> None:
    with FakeFederation(tmp_path, 2, 2, faults={"cart-0": {"1": "hang"}}) as fake:
        content = fake.codec.write_instruction(Train(fake.start(1), 0.0, 0.5))
        hangs, answers = (fake.grid.create_message(content, "train", node, "") for node in (1, 2))
        replies = fake.grid.send_and_receive([answers, hangs])
        next(replies)
        wait_until(lambda: len(fake.calls()) == 2)
        replies.close()
        (pid,) = {pid for _, pid, _, *names in fake.calls() if names == ["cart-0"]}
        assert not is_alive(pid)


@needs_workers
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_uses_them(tmp_path: Path, number: signal.Signals) -> None:
    process = start_process(
        f"""
        faults = {{"cart-0": {{"1": "print"}}, "cart-1": {{"2": "hang"}}}}
        with FakeFederation(Path({str(tmp_path)!r}), 2, 2, faults=faults) as fake:
            fake.train(1)
            print(*fake.pids(), flush=True)
            fake.train(2)
        """,
    )
    assert process.stdout is not None
    first_pids = list(map(int, process.stdout.readline().split()))  # what a client prints is not in this line
    (fork_server,) = {parent_of(pid) for pid in first_pids}
    log = tmp_path / "calls.jsonl"
    wait_until(lambda: [2] in [line[:1] for line in map(json.loads, log.read_text().splitlines())])
    pids = {json.loads(line)[1] for line in log.read_text().splitlines()}
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    for pid in {fork_server, *pids}:
        wait_until(lambda pid=pid: not is_alive(pid))
    assert "KeyboardInterrupt" in stderr if number == signal.SIGINT else process.returncode == -number
    assert "cart-0 prints" in stderr
    assert stderr.count("Traceback") == (number == signal.SIGINT)  # of this process, not of its workers


@needs_workers
def test_a_second_worker_starts_within_a_second() -> None:
    Worker().close()
    began = time.perf_counter()
    worker = Worker()
    send(worker.link, make_request(sys.path, "nowhere:Nothing", None, (), {}))
    reply = receive(worker.link)
    assert reply["raised"].startswith("ModuleNotFoundError")
    assert time.perf_counter() - began < 1
    assert worker.close() == "its process was ended by SIGKILL, perhaps because memory ran out"


def started_pids(capfd: pytest.CaptureFixture[str], count: int) -> list[int]:
    """Read the process ids that clients print."""
    text = ""

    def has_all() -> bool:
        nonlocal text
        text += capfd.readouterr().err
        return text.count("\n") >= count

    wait_until(has_all)
    return list(map(int, text.split()))


@needs_workers
def test_what_an_environment_has_started_ends_with_its_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether the worker dies or is closed, and even if what was started has left its session."""
    faults = {"cart-0": {"1": "start"}, "cart-1": {"2": "start and die"}}
    with FakeFederation(tmp_path, 2, 2, faults=faults) as fake:
        assert not failures(fake.train(1))
        (first,) = started_pids(capfd, 1)
        assert failures(fake.train(2)) == {"cart-1": "died"}
        (second,) = started_pids(capfd, 1)
        assert not is_alive(second)
        assert is_alive(first), "its own worker is well"
    assert not is_alive(first)


@needs_workers
@pytest.mark.parametrize("victim", ["the process that uses the workers", "the fork server"])
def test_what_an_environment_has_started_ends_with_the_others(tmp_path: Path, victim: str) -> None:
    process = start_process(
        f"""
        import sys
        from grpo_fed.engines.workers.fork_server import _ForkServer
        faults = {{"cart": {{"1": "start"}}}}
        with FakeFederation(Path({str(tmp_path)!r}), 1, 1, faults=faults) as fake:
            fake.train(1)
            print(_ForkServer.running()._process.pid, *fake.pids(), flush=True)
            sys.stdin.read()
        """,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    fork_server, worker = map(int, process.stdout.readline().split())
    started = int(process.stderr.readline())
    assert is_alive(started)
    if victim == "the fork server":
        os.kill(fork_server, signal.SIGKILL)  # a child of the process, whose id it has said
    else:
        process.kill()
    process.communicate(timeout=20)
    for pid in (worker, started):
        wait_until(lambda pid=pid: not is_alive(pid))


@needs_workers
def test_a_client_that_prints_for_ever_does_not_fill_a_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FakeFederation(tmp_path, 1, 1, faults={"cart": {"1": "flood"}}) as fake:
        assert not failures(fake.train(1))
    text = capfd.readouterr().err
    assert text.startswith("cartcart")
    assert text.count("is left out from here on") == 1
    assert len(text) < 70_000 < 2000 * len("cart" * 100)


def test_a_limit_on_output_is_a_bucket_that_fills_again() -> None:
    """65,536 bytes at once, then 256 in a second."""
    limit = PrintLimit(0.0)
    assert limit.cut(b"a" * 60_000, 0.0) == b"a" * 60_000
    kept = limit.cut(b"b" * 10_000, 0.0)
    assert kept.count(b"b") - kept[5536:].count(b"b") == 5536
    assert kept[5536:].startswith(b"\n[output of a client is left out")
    assert limit.cut(b"c", 0.0) == b""
    assert limit.cut(b"d" * 1000, 2.0) == b"d" * 512
    assert limit.cut(b"e" * 100_000, 10_000.0) == b"e" * 65_536


def start_process(code: str) -> subprocess.Popen[str]:
    """Start a process that leads a process group of its own."""
    lines = "\n".join(line[8:] for line in code.splitlines())
    # The process that runs the tests may ignore SIGINT, and a new process inherits that.
    default = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{default}\nfrom pathlib import Path\nfrom tests.support.fake_federation import FakeFederation\n{lines}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return stat_of(pid)[0] != "Z"
    except FileNotFoundError:
        return False


def parent_of(pid: int) -> int:
    """Return the id of a process's parent."""
    return int(stat_of(pid)[1])


def stat_of(pid: int) -> list[str]:
    """Read a process's state, its parent's id and the rest of what Linux says about it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not become true"
        time.sleep(0.01)


# Frames --------------------------------------------------------------------------------------------------------------

ARRAY = np.array([1.5, -0.0, np.nan, np.inf], np.float32)
START = Start("run", 3, ARRAY, (0, 2))
SUMMARY = EvaluationSummary(1.0, 0.5, -2.0, 3.0, 4, 5.5)
RECORDS: Sequence[Instruction | Answer] = [
    Train(START, 0.1, 0.2),
    Train(START, 0.1, 0.2, True, EvaluationPlan(2, False)),
    Measure(START, ARRAY[::-1], ((0.5, 1.0), (0.0, 0.25))),
    Evaluate(Start("run", 0, np.zeros(0, np.float32)), EvaluationPlan(0)),
    Trained(ARRAY, 10, 2, -0.5, 0.25, {"losses/kl": 1e-9}, np.zeros(4, np.float32), (0.1, float("inf")), SUMMARY),
    Trained(ARRAY, 10, 2, float(np.float64(0.1)), 0.25, {"losses/kl": np.float32(0.5)}),  # type: ignore[dict-item]
    Measured((0.1, 1e300)),
    Evaluated(SUMMARY),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_frame_carries_records_bit_for_bit(record: Instruction | Answer) -> None:
    near, far = socket.socketpair()
    with near, far:
        send(near, {"instructions": {"cart": record, "other": record}})
        received = receive(far)["instructions"]
        assert_same(received["cart"], record)
        assert_same(received["other"], record)


def test_a_frame_holds_an_array_of_a_hundred_clients_once() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        start = Start("run", 1, np.ones(10_000, np.float32))
        send(near, {"instructions": {f"cart-{k}": Train(start, 0, 1) for k in range(100)}}, time.monotonic() + 5)
        assert len(far.recv(1 << 22, socket.MSG_PEEK)) < 100_000
        received = receive(far)["instructions"]
        assert len({id(instruction.start.shared) for instruction in received.values()}) == 1


def test_sending_and_receiving_end_at_the_deadline() -> None:
    near, far = socket.socketpair()
    with near, far:
        with pytest.raises(TimeoutError):
            receive(near, time.monotonic() + 0.05)
        with pytest.raises(TimeoutError):  # the other end does not read
            send(near, {"large": np.zeros(10_000_000)}, time.monotonic() + 0.05)


def test_receiving_from_a_closed_socket_is_an_error() -> None:
    near, far = socket.socketpair()
    with near:
        far.close()
        with pytest.raises(EOFError):
            receive(near)


def assert_same(record: Any, expected: Any) -> None:
    assert type(record) is type(expected)
    for name, value in vars(record).items():
        other = getattr(expected, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            assert value.tobytes() == np.ascontiguousarray(other).tobytes()
        elif isinstance(value, Start | EvaluationPlan | EvaluationSummary):
            assert_same(value, other)
        else:
            assert value == other
