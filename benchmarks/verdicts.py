"""Measure how often twins give a wrong verdict on sharing, and how soon they warn where sharing costs.

*False alarms*: in the scenarios of benchmarks/alone every client leaves everything at once, so that it learns alone, as
its twin does. Whoever is found to gain or to lose by sharing, in any round, was misled by luck. 400 carts in ten seeds,
and 100 clients each with Acrobot and Pendulum in five. *Warnings*: in `scenarios/twins.toml`, two of eight carts are
wired backwards and all average everything.

    python -m benchmarks.verdicts --jobs 2

Every finished run appends a JSON line to benchmarks/results/verdicts.jsonl and is not repeated. The seeds, 1000 to
1009, were fixed beforehand; the margin of the verdicts and the stakes of their bets were chosen on the seeds 0
and 1.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import hashlib
import json
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import grpo_fed
from grpo_fed.federation.twins import MARGIN
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.sharing_verdicts import SharingVerdict
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

FILE = RESULTS / "verdicts.jsonl"
ALONE = Path(__file__).parent / "alone"
SEEDS = range(1000, 1010)
FEW_SEEDS = range(1000, 1005)
NULLS = ("cart", "acrobot", "pendulum")
SHARING = "twins"
"""The scenario in which sharing costs some clients."""
SOON = 10
"""The rounds within which whom sharing costs should be warned."""


@dataclass(frozen=True)
class VerdictTrial:
    """One run to make."""

    scenario: str
    """One of `NULLS`, or a shipped scenario."""
    seed: int

    @property
    def path(self) -> Path:
        """The scenario's file."""
        return ALONE / f"{self.scenario}.toml" if self.scenario in NULLS else find_scenario(self.scenario)

    @property
    def settings(self) -> str:
        """Digest of everything but the code that determines the result."""
        given = tomllib.loads(self.path.read_text())
        given.pop("description", None)
        return hashlib.sha256(json.dumps([given, self.seed], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class VerdictRun:
    """One finished run: a line of the results file."""

    scenario: str
    seed: int
    settings: str
    """`VerdictTrial.settings`."""
    first: dict[str, dict[str, int]]
    """By client and verdict, the first round in which the verdict was given; empty if it never was."""
    last: dict[str, tuple[float, float, float]]
    """By client, what sharing brought in the mean over all rounds, and the ends of the interval."""
    after: dict[str, float | None]
    """The final returns."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    done = {run.settings for run in read_runs(arguments.results)}
    trials = [trial for trial in plan_trials() if trial.settings not in done]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for future in as_completed([pool.submit(make_run, trial) for trial in trials]):
            run = future.result()
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(f"{run.scenario} seed {run.seed}: {run.seconds} s", flush=True)
    print("\n".join(format_table(select_runs(read_runs(arguments.results)))))


def plan_trials() -> Iterator[VerdictTrial]:
    """List the runs."""
    for seed in SEEDS:
        yield VerdictTrial(SHARING, seed)
        yield VerdictTrial("cart", seed)
        if seed in FEW_SEEDS:
            yield from (VerdictTrial(name, seed) for name in NULLS[1:])


def make_run(trial: VerdictTrial) -> VerdictRun:
    """Make a run in this process."""
    torch.set_num_threads(1)
    scenario = Scenario.load(trial.path, (f"seed={trial.seed}", 'device="cpu"'))
    first: dict[str, dict[str, int]] = {name: {} for entry in scenario.clients for name in entry.names}
    last: dict[str, tuple[float, float, float]] = {}

    def watch(record: RoundRecord) -> None:
        for client in record.clients:
            if found := SharingVerdict.of(client.metrics):
                last[client.client] = found.gain, found.low, found.high
                if found.verdict != "open":
                    first[client.client].setdefault(found.verdict, record.round)

    began = time.perf_counter()
    result = grpo_fed.run(scenario, watch=watch, workers=0)
    after = {name: client.after for name, client in result.clients.items()}
    seconds = round(time.perf_counter() - began, 2)
    return VerdictRun(trial.scenario, trial.seed, trial.settings, first, last, after, seconds)


def read_runs(path: Path = FILE) -> list[VerdictRun]:
    """Read all runs of a results file."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [VerdictRun(**line) for line in lines]


def select_runs(runs: Sequence[VerdictRun]) -> list[VerdictRun]:
    """Select the runs with the present settings."""
    wanted = {trial.settings for trial in plan_trials()}
    return [run for run in runs if run.settings in wanted]


# The tables ----------------------------------------------------------------------------------------------------------


def format_table(runs: Sequence[VerdictRun]) -> Iterator[str]:
    """Write a row for each scenario of clients that learn alone, then a row for each entry of the one that shares."""
    if not runs:
        return
    yield "| clients that learn alone | seeds | told that sharing costs, ever | that it pays, ever |"
    yield "| --- | ---: | ---: | ---: |"
    for name in NULLS:
        chosen = [run for run in runs if run.scenario == name]
        found = [verdicts for run in chosen for verdicts in run.first.values()]
        if found:
            counts = [sum(kind in verdicts for verdicts in found) for kind in ("costs", "pays")]
            cells = [f"{count} of {len(found)} ({count / len(found):.1%})" for count in counts]
            yield f"| {name} | {len(chosen)} | {' | '.join(cells)} |"
    yield ""
    yield (
        f"| clients of {SHARING} | told that sharing costs | by round {SOON} | rounds until then | costs, at the end"
        " | pays, at the end | sharing brings |"
    )
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    sharing = [run for run in runs if run.scenario == SHARING]
    for entry in dict.fromkeys(name.rsplit("-", 1)[0] for run in sharing for name in run.first):
        yield _format_entry(sharing, entry)


def _format_entry(runs: Sequence[VerdictRun], entry: str) -> str:
    names = [(run, name) for run in runs for name in run.first if name.rsplit("-", 1)[0] == entry]
    warned = sorted(run.first[name]["costs"] for run, name in names if "costs" in run.first[name])
    soon = sum(round_ <= SOON for round_ in warned)
    costs = sum(run.last[name][2] <= -MARGIN for run, name in names)
    pays = sum(run.last[name][1] >= MARGIN for run, name in names)
    gains = [100 * run.last[name][0] for run, name in names]
    span = f"{warned[0]} to {warned[-1]}" if warned else "-"
    return (
        f"| {entry} | {len(warned)} of {len(names)} | {soon} | {span} | {costs} | {pays}"
        f" | {min(gains):+.0f} to {max(gains):+.0f} % |"
    )


if __name__ == "__main__":
    main()
