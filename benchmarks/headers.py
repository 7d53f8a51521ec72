"""Measure what the headers of the shipped scenarios and the README say of them: final returns, and who left what.

A row is a shipped scenario, as its file has it or with a few keys changed. Every row runs with the same five seeds, 200
to 204, those of the scenario with a limit on costs with 910 to 914; they were fixed before any of these runs. The table
shows, for each entry of `[[clients]]`, the lowest and the highest final return over its clients and the seeds, and the
interquartile mean with its 95 % bootstrap interval; which groups its clients left, how many of them in all seeds
together and in which rounds; which they had left when the run ended; how often one came back; and, where costs have a
limit, the mean cost of training episodes over the last five rounds, with the lowest and the highest.

    python -m benchmarks.headers

Every finished run appends a JSON line to benchmarks/results/headers.jsonl and is not repeated.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import hashlib
import json
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grpo_fed
from grpo_fed.runs.metrics import TRAINING_COST
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import estimate, interquartile_mean
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

SEEDS = range(200, 205)
SAFETY_SEEDS = range(910, 915)
LAST = 5
"""Rounds at the end of a run over which the mean cost of training episodes is taken."""
FILE = RESULTS / "headers.jsonl"
FEDAVG = "method=fedavg"
PERSISTENCE = 'merge.rule="persistence"'
BOOLEANS = ("true", "false")
CONSTANT = 'objective.schedule="constant"'


@dataclass(frozen=True)
class Row:
    """A shipped scenario with some keys changed."""

    scenario: str
    overrides: tuple[str, ...] = ()
    seeds: Sequence[int] = SEEDS

    def load(self, seed: int) -> Scenario:
        """Load the scenario with a seed."""
        return Scenario.load(find_scenario(self.scenario), (*self.overrides, f"seed={seed}", 'device="cpu"'))

    def settings(self, seed: int) -> str:
        """Digest of everything but the code that determines the result."""
        given = tomllib.loads(find_scenario(self.scenario).read_text())
        given.pop("description", None)
        text = json.dumps([given, self.overrides, seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


ROWS = (
    Row("quickstart"),
    Row("quickstart", (CONSTANT,)),
    Row("contrary"),
    Row("contrary", (CONSTANT,)),
    *(Row("contrary", (f"method={name}",)) for name in ("local", "fedavg", "fedper", "lg", "ditto", "clusters")),
    *(Row("contrary", ('merge.rule="huber"', "merge.threshold=0.02", f"merge.refit={refit}")) for refit in BOOLEANS),
    Row("grouped-sensors"),
    Row("grouped-sensors", (FEDAVG,)),
    Row("byzantine"),
    *(Row("byzantine", (f'merge.rule="{rule}"',)) for rule in ("krum", "median")),
    Row("byzantine", ('merge.rule="huber"', "merge.threshold=0.05")),
    Row("byzantine", (PERSISTENCE,)),
    Row("byzantine", (FEDAVG,)),
    Row("tabular"),
    Row("goals"),
    Row("poles"),
    *(Row("detours", overrides, SAFETY_SEEDS) for overrides in ((), ("objective.cost.limit=1e6",))),
)


@dataclass(frozen=True)
class Change:
    """A client left a group or came back to it."""

    round: int
    client: str
    group: str
    rho: float


@dataclass(frozen=True)
class HeaderRun:
    """One finished run: a line of the results file."""

    scenario: str
    overrides: Sequence[str]
    seed: int
    settings: str
    """`Row.settings`."""
    tasks: Mapping[str, str]
    """The entry of `[[clients]]` of every client."""
    scores: Mapping[str, float | None]
    """The final return of every client."""
    left: Sequence[Change]
    returned: Sequence[Change]
    stayed: Sequence[Change]
    """Clients in conflict that stayed, since sharing was no worse."""
    departed: Mapping[str, Sequence[str]]
    """The groups that every client had left when the run ended."""
    clusters: Mapping[str, Mapping[str, int]]
    """Every client's cluster in each block when the run ended; empty without clusters."""
    seconds: float
    costs: Mapping[str, float] = field(default_factory=dict)
    """Every client's mean cost of a training episode over the last rounds; empty where costs have no limit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default="", help="comma-separated; default: all")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.scenarios.split(",") if arguments.scenarios else {row.scenario for row in ROWS}
    rows = [row for row in ROWS if row.scenario in chosen]
    for row in rows:
        for seed in row.seeds:
            if row.settings(seed) not in {run.settings for run in read_runs(arguments.results)}:
                run = make_run(row, seed)
                with arguments.results.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
                print(f"{row.scenario} {' '.join(row.overrides)} seed {seed}: {run.seconds} s", flush=True)
    print("\n".join(format_table(rows, read_runs(arguments.results))))


def make_run(row: Row, seed: int) -> HeaderRun:
    """Make a run in this process."""
    records: list[RoundRecord] = []
    start = time.perf_counter()
    result = grpo_fed.run(row.load(seed), watch=records.append, workers=0)
    seconds = time.perf_counter() - start
    last = records[-1].clients
    return HeaderRun(
        scenario=row.scenario,
        overrides=row.overrides,
        seed=seed,
        settings=row.settings(seed),
        tasks={record.client: record.task for record in last},
        scores={name: client.after for name, client in result.clients.items()},
        left=list(list_departures(records)),
        returned=list(list_changes(records, "returned")),
        stayed=list(list_changes(records, "stayed")),
        departed={record.client: list(record.departed) for record in last},
        clusters={record.client: dict(record.clusters) for record in last if record.clusters},
        seconds=round(seconds, 1),
        costs=last_costs(records),
    )


def last_costs(records: Sequence[RoundRecord]) -> dict[str, float]:
    """Average each client's mean cost of a training episode over the last rounds, if it has any."""
    costs: dict[str, list[float]] = {}
    for record in records[-LAST:]:
        for client in record.clients:
            if TRAINING_COST in client.metrics:
                costs.setdefault(client.client, []).append(client.metrics[TRAINING_COST])
    return {name: float(np.mean(values)) for name, values in costs.items()}


def list_changes(records: Iterable[RoundRecord], kind: str) -> Iterator[Change]:
    """List what clients came back to or stayed in, by round."""
    for record in records:
        for client in record.clients:
            for group, rho in getattr(client, kind).items():
                yield Change(record.round, client.client, group, rho)


def list_departures(records: Iterable[RoundRecord]) -> Iterator[Change]:
    """List the groups that clients left, by round, whatever the rule; rho is NaN for rules without it."""
    before: dict[str, set[str]] = {}
    for record in records:
        for client in record.clients:
            for group in client.departed:
                if group not in before.get(client.client, ()):
                    yield Change(record.round, client.client, group, client.left.get(group, float("nan")))
            before[client.client] = set(client.departed)


def read_runs(results: Path) -> list[HeaderRun]:
    """Read the finished runs."""
    if not results.exists():
        return []
    return [_read_run(json.loads(line)) for line in results.read_text().splitlines()]


def _read_run(line: dict[str, Any]) -> HeaderRun:
    changes = {kind: [Change(**change) for change in line[kind]] for kind in ("left", "returned", "stayed")}
    return HeaderRun(**{**line, **changes})


# The table -----------------------------------------------------------------------------------------------------------


def format_table(rows: Iterable[Row], runs: Sequence[HeaderRun]) -> Iterator[str]:
    """Write a line for each row and entry of clients."""
    by_settings = {run.settings: run for run in runs}
    heads = ("scenario", "changed", "clients", "final return", "mean", "left (clients; rounds)", "out at the end")
    heads = (*heads, "back", "cost")
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for row in rows:
        finished = [by_settings[row.settings(seed)] for seed in row.seeds if row.settings(seed) in by_settings]
        for task in dict.fromkeys(task for run in finished for task in run.tasks.values()):
            scores = [score for run in finished for name, score in run.scores.items() if run.tasks[name] == task]
            known = [score for score in scores if score is not None]
            by_seed = [[run.scores[name] for name in run.tasks if run.tasks[name] == task] for run in finished]
            changed = " ".join(row.overrides)
            yield (
                f"| {row.scenario} | {changed} | {len(scores)} {task} | {min(known):.4g} to {max(known):.4g}"
                f" | {_describe_mean(by_seed)}"
                f" | {_describe_left(finished, task)} | {_describe_out(finished, task)}"
                f" | {sum(run.tasks[change.client] == task for run in finished for change in run.returned)}"
                f" | {_describe_costs(finished, task)} |"
            )


def _describe_mean(scores: Sequence[Sequence[float | None]]) -> str:
    array = np.array(scores, dtype=float)
    result = estimate(interquartile_mean, array, generator=np.random.default_rng(0))
    return f"{result.value:.4g} [{result.low:.4g}, {result.high:.4g}]"


def _describe_costs(runs: Sequence[HeaderRun], task: str) -> str:
    costs = [cost for run in runs for name, cost in run.costs.items() if run.tasks[name] == task]
    return f"{np.mean(costs):.2g}, {min(costs):.2g} to {max(costs):.2g}" if costs else ""


def _describe_left(runs: Sequence[HeaderRun], task: str) -> str:
    rounds: dict[str, dict[tuple[int, str], int]] = {}
    for run in runs:
        for change in run.left:
            if run.tasks[change.client] == task:
                rounds.setdefault(change.group, {}).setdefault((run.seed, change.client), change.round)
    parts = (
        f"{group}: {len(first)}; {min(first.values())} to {max(first.values())}" for group, first in rounds.items()
    )
    return "<br>".join(parts)


def _describe_out(runs: Sequence[HeaderRun], task: str) -> str:
    counts: dict[str, int] = {}
    for run in runs:
        for name, groups in run.departed.items():
            for group in groups if run.tasks[name] == task else ():
                counts[group] = counts.get(group, 0) + 1
    return "<br>".join(f"{group}: {count}" for group, count in counts.items())


if __name__ == "__main__":
    main()
