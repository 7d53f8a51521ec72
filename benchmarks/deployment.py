"""Time the rounds of a deployment on one machine: 8 small clients of the quickstart, over loopback.

Contestants: `before`, a SuperNode for each client as it was in commit e23904b; `fleet`, the resident node on Flower's
own Fleet API; `exchange`, the resident node with requests that wait at the SuperLink; `local`, the local engine. They
take turns, each in a process of its own, so that other work on the machine slows down all of them alike.

    python -m benchmarks.deployment --repetitions 3

Every run appends a JSON line to benchmarks/results/deployment.jsonl and is not repeated; a table is printed at the end.
Rounds are timed from the second on, when processes have started and environments are made.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.learning import describe_machine

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "results" / "deployment.jsonl"
BEFORE_COMMIT = "e23904b"
ROUNDS = {"before": 4, "fleet": 4, "exchange": 12, "local": 12}
"""Rounds of a run, by contestant: fewer where they are slow."""
WORDS = {
    "before": "before: a SuperNode for each client",
    "fleet": "the resident node on Flower's Fleet API",
    "exchange": "the resident node with waiting requests",
    "local": "the local engine",
}
LOCAL_TARGET, BEFORE_TARGET = 3, 20
"""A round should take at most so many times the local engine's, and be so many times faster than before."""
PACKAGES = ("grpo-fed", "flwr", "torch", "gymnasium", "numpy")


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--contestants", default=",".join(ROUNDS), help="those that take turns; by default all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        unpack_commit(BEFORE_COMMIT, before)
        for repetition in range(options.repetitions):
            finished = {line["contestant"] for line in read_results() if line["repetition"] == repetition}
            for contestant in options.contestants.split(","):
                if contestant not in finished:
                    run_trial(contestant, repetition, before if contestant == "before" else ROOT)
    print("\n".join(format_table(read_results())))


def unpack_commit(commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def run_trial(contestant: str, repetition: int, root: Path) -> None:
    """Do a run with the package in a folder, and append its line."""
    program = [sys.executable, str(ROOT / "benchmarks" / "deployment_trial.py")]
    arguments = [contestant, str(ROOT / "scenarios" / "quickstart.toml"), str(ROUNDS[contestant])]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    load = os.getloadavg()[0]
    done = subprocess.run(
        [*program, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{contestant} failed:\n{done.stderr[-3000:]}")
    line = {
        "contestant": contestant,
        "repetition": repetition,
        **json.loads(done.stdout.splitlines()[-1]),
        "load": load,
        "machine": describe_machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{contestant} {repetition}: {median(line['seconds']):.2f} s a round at load {load:.1f}", flush=True)


def read_results() -> list[dict[str, Any]]:
    """Read the finished runs."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def format_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write the table, and whether the targets are reached."""
    by_contestant = {name: [line for line in lines if line["contestant"] == name] for name in ROUNDS}
    if not all(by_contestant.values()):
        return
    seconds = {name: summarise(runs, lambda run: median(run["seconds"])) for name, runs in by_contestant.items()}
    processor = {name: summarise(runs, lambda run: run["cpu_seconds"]) for name, runs in by_contestant.items()}
    yield "| contestant | seconds a round | of the local one | CPU seconds a round | the whole run, s | load | runs |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, runs in by_contestant.items():
        ratio = seconds[name] / seconds["local"]
        whole = summarise(runs, lambda run: run["whole_seconds"])
        cells = [WORDS[name], f"{seconds[name]:.2f}", f"{ratio:.1f}x", f"{processor[name]:.2f}", f"{whole:.0f}"]
        cells.append(f"{summarise(runs, lambda run: run['load']):.0f}")
        yield f"| {' | '.join(cells)} | {len(runs)} |"
    yield ""
    slower, faster = seconds["exchange"] / seconds["local"], seconds["before"] / seconds["exchange"]
    yield (
        f"- At most {LOCAL_TARGET} times the local engine's round: {slower:.1f} times,"
        f" {'reached' if slower <= LOCAL_TARGET else 'missed'}."
    )
    yield (
        f"- {BEFORE_TARGET} times as fast as before: {faster:.1f} times,"
        f" {'reached' if faster >= BEFORE_TARGET else 'missed'}."
    )


def summarise(runs: Sequence[Mapping[str, Any]], figure: Any) -> float:
    """Return the median of a figure over runs."""
    return float(median(figure(run) for run in runs))


if __name__ == "__main__":
    main()
