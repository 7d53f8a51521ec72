"""Run one federation and print what its rounds cost as JSON, for deployment.py.

It imports nothing but grpo_fed, as it also runs with that of an older commit. Seconds are the run's own; processor time
is that of all processes that descend from this one, with those that have ended, from round 1 to the last.

    python -m benchmarks.deployment_trial CONTESTANT SCENARIO ROUNDS
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOOK = 0.02
"""Seconds between two looks at the run's folder."""


def main() -> None:
    """Run the contestant that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant")
    parser.add_argument("scenario", type=Path)
    parser.add_argument("rounds", type=int)
    options = parser.parse_args()
    contestant, path, rounds = options.contestant, options.scenario, options.rounds
    from grpo_fed.engines.start import run
    from grpo_fed.scenario.scenario import Scenario

    if contestant == "fleet":
        use_plain_superlink()
    scenario = Scenario.loads(path.read_text(encoding="utf-8"), overrides=[f"rounds={rounds}"])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        samples: list[tuple[float, float]] = []
        threading.Thread(target=sample_rounds, args=(out / "rounds.jsonl", samples), daemon=True).start()
        result = run(scenario, out, engine="local" if contestant == "local" else "flower")
        whole = time.monotonic() - began
        time.sleep(5 * LOOK)
        lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert result.status == "finished", result.status
    assert not result.missing, result.missing
    (_, first_cpu), (_, last_cpu) = samples[1], samples[-1]
    print(
        json.dumps(
            {
                "seconds": [line["time/round_s"] for line in lines[2:]],
                "cpu_seconds": (last_cpu - first_cpu) / (len(samples) - 2),
                "whole_seconds": whole,
                "scores": {name: client.after for name, client in result.clients.items()},
            }
        )
    )


def use_plain_superlink() -> None:
    """Start Flower's own SuperLink, at which no request waits."""
    from grpo_fed.engines.flower import superlink

    superlink.PROGRAM = [superlink.find_script("flower-superlink")]


def sample_rounds(path: Path, samples: list[tuple[float, float]]) -> None:
    """Append the time and all processor time so far whenever a further round is in the file; it begins with round 0."""
    while True:
        count = path.read_bytes().count(b"\n") if path.exists() else 0
        if count > len(samples):
            sample = time.monotonic(), measure_processor_time(os.getpid())
            samples += [sample] * (count - len(samples))
        time.sleep(LOOK)


def measure_processor_time(root: int) -> float:
    """Add up the processor seconds of a process and its descendants, those that have ended and been waited for too."""
    parents, ticks = {}, {}
    for pid, fields in read_processes():
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))

    def descends(pid: int) -> bool:
        while pid != root and pid in parents:
            pid = parents[pid]
        return pid == root

    return sum(ticks[pid] for pid in ticks if descends(pid)) / os.sysconf("SC_CLK_TCK")


def read_processes() -> Iterator[tuple[int, list[str]]]:
    """Yield each process with the fields of its `stat` after the name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue


if __name__ == "__main__":
    main()
