"""Hundreds of faults, one after another: what survives, what is lost, and how long it takes until all is well.

    python -m benchmarks.faults                     500 faults on the local engine, 60 on a deployment with TLS and keys
    python -m benchmarks.faults --part local        only the first
    python -m benchmarks.faults --part short        a dozen faults of all kinds on the local engine, in CI

Clients' environments misbehave, runs are killed, interrupted and resumed, files are damaged, disks are full, clocks
jump, MLflow is away; on a deployment processes are killed, the network is cut, keys are wrong. A fault has survived if
the run ends with the same bits as without it, or as without the clients that failed, and if all that was lost is named.
A seed chooses all faults. The exit code is 1 if one has not survived. The lines of a part replace those that
benchmarks/results/faults.jsonl has of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.local_faults import Outcome, StoppedRuns, misbehave

FILE = Path(__file__).parent / "results" / "faults.jsonl"
LOCAL = {"clients": 300, "stops": 80, "files": 80, "disk": 25, "clock": 9, "MLflow": 6}
"""How many faults of each group happen on the local engine, at least."""
SHORT = {"clients": 6, "stops": 2, "files": 3, "disk": 1, "clock": 1, "MLflow": 0}
DEPLOYED = 60
PER_RUN = 24
"""Faults of clients in a run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "local", "deployment", "short"), default="all")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    for part in ("local", "deployment") if options.part == "all" else (options.part,):
        began, of_part = time.monotonic(), list[Outcome]()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            for outcome in make_faults(part, Path(folder), options.seed):
                of_part.append(outcome)
                if part != "short":
                    save_part(options.results, part, options.seed, of_part)
                if not outcome.survived:
                    print(f"NOT SURVIVED: {outcome.kind}: {outcome.problem}", flush=True)
                elif len(of_part) % 20 == 0:
                    print(f"{part}: {len(of_part)} faults, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        outcomes += of_part
    print("\n".join(format_table([{"part": options.part, **asdict(outcome)} for outcome in outcomes])))
    sys.exit(not all(outcome.survived for outcome in outcomes))


def save_part(file: Path, part: str, seed: int, outcomes: Sequence[Outcome]) -> None:
    """Replace the lines of a part in the file of results."""
    others = [line for line in read_results(file) if line["part"] != part]
    lines = [{"part": part, "seed": seed, **asdict(outcome)} for outcome in outcomes]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (*others, *lines)))


def make_faults(part: str, folder: Path, seed: int) -> Iterator[Outcome]:
    """Make the faults of a part in a folder."""
    if part == "deployment":
        from benchmarks.deployed_faults import make_deployed_faults

        yield from make_deployed_faults(folder, seed, DEPLOYED)
        return
    counts = SHORT if part == "short" else LOCAL
    done = 0
    for number in range(counts["clients"]):
        if done >= counts["clients"]:
            break
        for outcome in misbehave(folder / f"clients-{number}", seed + number, min(PER_RUN, counts["clients"] - done)):
            done += outcome.kind != "none"
            yield outcome
    runs = StoppedRuns(folder / "runs", seed)
    done = number = 0
    while done < counts["stops"]:
        for outcome in runs.stop_anywhere(number):
            done += outcome.kind != "none"
            yield outcome
        number += 1
    kinds: Mapping[str, Callable[[int], Outcome]] = {
        "files": runs.damage,
        "disk": runs.fill_disk,
        "clock": runs.shake_clock,
        "MLflow": runs.refuse_tracking,
    }
    for name, make in kinds.items():
        for number in range(counts[name]):
            yield make(number)


def read_results(file: Path = FILE) -> list[dict[str, Any]]:
    """Read what became of all faults."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def format_table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write a table with a row for each kind of fault."""
    if not results:
        return
    by_kind: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in results:
        by_kind[line["part"], line["kind"]].append(line)
    survived = sum(line["survived"] for line in results)
    parts = {part: sum(line["part"] == part for line in results) for part, _ in by_kind}
    counts = " and ".join(f"{count} ({part})" for part, count in parts.items())
    yield f"{survived} of {len(results)} faults survived: {counts}.\n"
    yield "| part | fault | injected | survived | rounds lost | data lost, named | seconds to recover, median (worst) |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (part, kind), lines in sorted(by_kind.items()):
        seconds = [line["seconds"] for line in lines if line["seconds"] is not None]
        times = f"{np.median(seconds):.1f} ({max(seconds):.1f})" if seconds else ""
        counts = len(lines), *(sum(line[key] for line in lines) for key in ("survived", "rounds_lost", "data_lost"))
        yield f"| {part} | {kind} | {' | '.join(map(str, counts))} | {times} |"


if __name__ == "__main__":
    main()
