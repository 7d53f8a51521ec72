"""Time from a command to the first trained round, beside what Flower's own `flwr run` needs for its first message.

Contestants, which take turns: `flwr`, `flwr run` of an app without torch in which a server sends a message to each of
two clients, on the local SuperLink that Flower starts for it; `before`, `grpo-fed run quickstart --engine flower` as it
was in commit 8c1e745, which called `flwr` as processes; `now`, the same command as in the latest commit. Each starts in
an empty `FLWR_HOME`. For `flwr` the clock stops when the first client gets its message, for ours when the record of the
first round is written: eight clients have been evaluated and trained then.

    python -m benchmarks.deployment_start --repetitions 5

Every run appends a JSON line to benchmarks/results/deployment_start.jsonl and is not repeated.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.deployment import PACKAGES, unpack_commit
from benchmarks.deployment_trial import read_processes
from benchmarks.learning import describe_machine

FILE = Path(__file__).parent / "results" / "deployment_start.jsonl"
BEFORE_COMMIT = "8c1e745"
CONTESTANTS = {
    "flwr": "Flower's `flwr run`, to the first message of two clients without torch",
    "before": "`grpo-fed run quickstart --engine flower`, to the first trained round, as it was",
    "now": "the same now",
}
TARGET = 2.0
"""The first trained round should take at most so many times what Flower needs to its first message."""
PATIENCE = 300.0
LOOK = 0.02
"""Seconds between two looks."""

PROJECT = """
[project]
name = "first-message"
version = "1.0.0"
description = "Says when a client gets its first message."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
serverapp = "app.server:app"
clientapp = "app.client:app"
"""
SERVER = """
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        pass
    list(grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes]))
"""
CLIENT = """
import os
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    Path(os.environ["FIRST_MESSAGE"]).touch()
    return Message(RecordDict(), reply_to=message)
"""


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = {"before": Path(name) / "before", "now": Path(name) / "now"}
        unpack_commit(BEFORE_COMMIT, folders["before"])
        unpack_commit("HEAD", folders["now"])
        for repetition in range(options.repetitions):
            finished = {line["contestant"] for line in read_results() if line["repetition"] == repetition}
            for contestant in CONTESTANTS:
                if contestant not in finished:
                    run_trial(contestant, repetition, folders)
    print("\n".join(format_table(read_results())))


def run_trial(contestant: str, repetition: int, folders: Mapping[str, Path]) -> None:
    """Do a run, and append its line."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        seconds = time_flower(folder) if contestant == "flwr" else time_ours(folder, folders[contestant])
    line = {
        "contestant": contestant,
        "repetition": repetition,
        "seconds": seconds,
        "load": load,
        "machine": describe_machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{contestant} {repetition}: {seconds:.1f} s at load {load:.1f}", flush=True)


def time_flower(folder: Path) -> float:
    """Time Flower's own command, with a local SuperLink that is not there yet."""
    app, reached = folder / "project", folder / "reached"
    (app / "app").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    for part, text in (("__init__", ""), ("server", SERVER), ("client", CLIENT)):
        (app / "app" / f"{part}.py").write_text(text)
    environment = {**make_environment(folder), "FIRST_MESSAGE": str(reached)}
    began = time.monotonic()
    command = [str(Path(sys.executable).parent / "flwr"), "run", str(app)]
    with start(command, environment, folder) as process:
        try:
            return wait(reached.exists, began, process)
        finally:
            process.wait(PATIENCE)
            end_processes(str(folder))


def time_ours(folder: Path, root: Path) -> float:
    """Time our command, with the package in a folder."""
    environment = {**make_environment(folder), "PYTHONPATH": str(root)}
    records = folder / "run" / "rounds.jsonl"
    options = [
        "--engine",
        "flower",
        "--out",
        str(folder / "run"),
        "--set",
        "rounds=1",
        "--track",
        "off",
        "--no-figures",
    ]
    began = time.monotonic()
    with start([sys.executable, "-m", "grpo_fed", "run", "quickstart", *options], environment, folder) as process:
        seconds = wait(lambda: count_lines(records) > 0, began, process)
        assert process.wait(PATIENCE) == 0, (folder / "log").read_text()[-2000:]
    return seconds


def make_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a contestant: offline, one thread a process, an empty configuration of Flower's."""
    return {
        **os.environ,
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def start(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a contestant; its output goes to a log."""
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, env=dict(environment), cwd=folder, stdout=log, stderr=log)


def wait(condition: Callable[[], bool], began: float, process: "subprocess.Popen[bytes]") -> float:
    """Wait until a condition is true, and return the seconds since the beginning."""
    while not condition():
        assert time.monotonic() < began + PATIENCE, "it takes too long"
        assert process.poll() in (None, 0), "it has failed"
        time.sleep(LOOK)
    return time.monotonic() - began


def count_lines(path: Path) -> int:
    """Count the lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def end_processes(folder: str) -> None:
    """End the processes with this folder in their environment, that is Flower's local SuperLink and what it started."""
    for pid, _ in read_processes():
        try:
            if f"FLWR_HOME={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes() and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue


def read_results() -> list[dict[str, Any]]:
    """Read the finished runs."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def format_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write the table, and whether the target is reached."""
    by_contestant = {name: [line for line in lines if line["contestant"] == name] for name in CONTESTANTS}
    if not all(by_contestant.values()):
        return
    yield "| contestant | seconds, median (lowest to highest) | load | runs |"
    yield "| --- | --- | --- | --- |"
    for name, runs in by_contestant.items():
        seconds = [run["seconds"] for run in runs]
        cell = f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        yield f"| {CONTESTANTS[name]} | {cell} | {median(run['load'] for run in runs):.0f} | {len(runs)} |"
    yield ""
    flower, now = (median(run["seconds"] for run in by_contestant[name]) for name in ("flwr", "now"))
    yield (
        f"- The first trained round within {TARGET:g} times Flower's first message: {now / flower:.1f} times,"
        f" {'reached' if now <= TARGET * flower else 'missed'}."
    )


if __name__ == "__main__":
    main()
