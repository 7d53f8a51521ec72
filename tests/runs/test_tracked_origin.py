"""What MLflow is told of a run before and beside its rounds: names, tags, tasks, the machine, a server that is away."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from grpo_fed.runs.called_as import called_as
from grpo_fed.runs.tracking import Tracker, resolve_store
from grpo_fed.runs.tracking.machine import MachineSampler, read_gpu_lines
from grpo_fed.runs.tracking.origin import RunOrigin, find_commit, origin_tags, run_name
from grpo_fed.runs.tracking.probe import find_trouble
from tests.support.tracking_runs import scenario


def test_a_run_is_named_by_what_tells_it_apart():
    assert run_name("grpo", 3, RunOrigin()) == "grpo seed 3"
    changed = RunOrigin("flower", ("seed=3", "method=grpo", "objective.clip=0.3", "rounds=5"))
    assert run_name("grpo", 3, changed) == "grpo seed 3, objective.clip=0.3, rounds=5, flower"
    long = run_name("grpo", 3, RunOrigin(changes=tuple(f"merge.threshold={n}" for n in range(40))))
    assert len(long) <= 200


def test_the_tags_have_the_command_without_passwords():
    command = ("/usr/bin/grpo-fed", "run", "my carts.toml", "--track", "http://ann:hush-hush@host:5000")
    tags = origin_tags(RunOrigin("flower"), (*command, "--x=topsecret"), {"AWS_SECRET_ACCESS_KEY": "topsecret"})
    assert tags["command"] == "grpo-fed run 'my carts.toml' --track 'http://***@host:5000' '--x=***'"
    assert tags["engine"] == "flower"
    assert {"host", "version.python", "version.torch", "mlflow.user"} <= set(tags)


def test_the_commit_is_that_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert find_commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    (tmp_path / "a.txt").write_text("1")
    for arguments in (["init", "-q"], ["add", "a.txt"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert find_commit() == head
    (tmp_path / "a.txt").write_text("2")
    assert find_commit() == f"{head} with changes"


# A server, asked before the run --------------------------------------------------------------------------------------


@contextmanager
def server(users: dict[str, int]) -> Iterator[str]:
    """Answer each user's question with a code; nobody else's with 401."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
            self.send_response(users.get(given, 401))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_trouble_with_a_server_is_said_in_a_phrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def trouble_at(address: str) -> str | None:
        store = resolve_store(f"http://{address}", {})
        assert store is not None
        return find_trouble(store, 5.0, {})

    with server({"ann:right": 200, "bob:b": 404, "cat:c": 503}) as address:
        assert trouble_at(f"ann:right@{address}") is None
        refused = "refuses the user or the password (HTTP 401); give them in MLFLOW_TRACKING_USERNAME"
        assert str(trouble_at(f"ann:wrong@{address}")).startswith(refused)
        assert trouble_at(f"bob:b@{address}") == "is no server of MLflow (HTTP 404)"
        assert trouble_at(f"cat:c@{address}") == "answers with an error (HTTP 503)"
        (tmp_path / ".mlflow").mkdir()
        credentials = "[mlflow]\nmlflow_tracking_username = ann\nmlflow_tracking_password = right\n"
        (tmp_path / ".mlflow" / "credentials").write_text(credentials)
        assert trouble_at(address) is None
    assert str(trouble_at(address)).startswith("does not answer (connection refused")


def test_a_tracker_says_what_comes_of_the_trouble(tmp_path: Path):
    away = Tracker.open("http://127.0.0.1:9", tmp_path / "run", scenario())
    assert away.find_trouble() == (
        "MLflow: http://127.0.0.1:9 does not answer (connection refused); the run goes on, and"
        f" {called_as()} replay {tmp_path / 'run'} sends later what is left at its end"
    )
    assert Tracker.open("off", tmp_path / "run", scenario()).find_trouble() is None
    with pytest.raises(ValueError, match="--register needs a store"):
        Tracker.open("off", tmp_path / "run", scenario(), origin=RunOrigin(register=True))


# The machine ----------------------------------------------------------------------------------------------------------


def test_each_gpu_has_its_use_and_its_memory():
    assert read_gpu_lines("37, 1000, 80000\n[N/A], 5, 10\n0, 0, 80000\n") == {
        "system/gpu_0_utilization_percentage": 37.0,
        "system/gpu_0_memory_usage_megabytes": pytest.approx(1048.576),
        "system/gpu_0_memory_usage_percentage": 1.25,
        "system/gpu_2_utilization_percentage": 0.0,
        "system/gpu_2_memory_usage_megabytes": 0.0,
        "system/gpu_2_memory_usage_percentage": 0.0,
    }


def test_samples_wait_until_they_are_sent_and_the_last_is_taken_at_the_end():
    sampler = MachineSampler(first=0.0, interval=60.0)
    until = time.monotonic() + 30
    while not (waiting := sampler.waiting()) and time.monotonic() < until:
        time.sleep(0.01)
    assert sampler.waiting() == waiting
    assert 0 < waiting[0].values["system/system_memory_usage_percentage"] <= 100
    sampler.stop()
    first, last = sampler.waiting()
    sampler.drop([first])
    assert sampler.waiting() == [last]


# The guard of MLflow's pages -----------------------------------------------------------------------------------------


def test_a_guarded_command_ends_with_the_process_that_started_it():
    inner = "import time; print(1, flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    guard = [sys.executable, "-m", "grpo_fed.runs.tracking.guard", sys.executable, "-c", code]
    process = subprocess.Popen(guard, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout, process:
        assert process.stdout.readline() == b"1\n"
        process.stdin.close()
        assert process.stdout.read() == b""  # the innermost process, which holds the pipe too, has ended
        assert process.wait(30) == -signal.SIGKILL
