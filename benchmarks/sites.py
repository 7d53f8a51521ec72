"""Measure which sites, and which clients at their sites, leave which blocks: three sites of four carts.

The scenario `sites` with its south wired backwards, the same without anything planted, and both with other methods.
Every row runs with the same five seeds, 700 to 704, which were fixed before any of these runs. The table shows which
groups sites and clients left in all seeds together and in which rounds, what they had left at the end, how often one
came back, and the interquartile means of the final returns with 95 % bootstrap intervals.

    python -m benchmarks.sites

Every finished run appends a JSON line to benchmarks/results/sites.jsonl and is not repeated.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import grpo_fed
from benchmarks.headers import Change, Row, list_departures
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import estimate, interquartile_mean

SEEDS = range(700, 705)
FILE = RESULTS / "sites.jsonl"
NOTHING = "clients.south.kwargs={}"
ROWS = {
    "south wired backwards": Row("sites"),
    "the same, `fedavg`": Row("sites", ("method=fedavg",)),
    "the same, without sites": Row("sites", ("sites=[]",)),
    "nothing planted": Row("sites", (NOTHING,)),
}
"""What is planted and how clients share."""


@dataclass(frozen=True)
class SiteRun:
    """One finished run: a line of the results file."""

    row: str
    seed: int
    settings: str
    """`Row.settings`."""
    tasks: Mapping[str, str]
    """The entry of `[[clients]]` of every client."""
    scores: Mapping[str, float | None]
    """The final return of every client."""
    left_by_sites: Sequence[Change]
    left_by_clients: Sequence[Change]
    returned: Sequence[Change]
    """Sites and clients that came back."""
    departed: Mapping[str, Sequence[str]]
    """The groups that every site and client had left when the run ended."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, row in ROWS.items():
        for seed in SEEDS:
            if row.settings(seed) not in {run.settings for run in read_runs(arguments.results)}:
                run = make_run(name, row, seed)
                with arguments.results.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
                print(f"{name} seed {seed}: {run.seconds} s", flush=True)
    print("\n".join(format_table(read_runs(arguments.results))))


def make_run(name: str, row: Row, seed: int) -> SiteRun:
    """Make a run in this process."""
    records: list[RoundRecord] = []
    start = time.perf_counter()
    result = grpo_fed.run(row.load(seed), watch=records.append, workers=0)
    last = records[-1]
    return SiteRun(
        row=name,
        seed=seed,
        settings=row.settings(seed),
        tasks={record.client: record.task for record in last.clients},
        scores={client: each.after for client, each in result.clients.items()},
        left_by_sites=list(list_site_departures(records)),
        left_by_clients=list(list_departures(records)),
        returned=list(list_returns(records)),
        departed={
            **{f"site {record.site}": list(record.departed) for record in last.sites if record.departed},
            **{record.client: list(record.departed) for record in last.clients if record.departed},
        },
        seconds=round(time.perf_counter() - start, 1),
    )


def list_site_departures(records: Iterable[RoundRecord]) -> Iterator[Change]:
    """List the groups that sites left, by round."""
    for record in records:
        for site in record.sites:
            for group, rho in site.left.items():
                yield Change(record.round, site.site, group, rho)


def list_returns(records: Iterable[RoundRecord]) -> Iterator[Change]:
    """List what sites and clients came back to, by round, with the gain that decided."""
    for record in records:
        named = [*((site.site, site) for site in record.sites), *((each.client, each) for each in record.clients)]
        for name, each in named:
            for group, gain in each.returned.items():
                yield Change(record.round, name, group, gain)


def read_runs(results: Path) -> list[SiteRun]:
    """Read the finished runs."""
    if not results.exists():
        return []
    kinds = ("left_by_sites", "left_by_clients", "returned")
    lines = (json.loads(line) for line in results.read_text().splitlines())
    return [SiteRun(**{**line, **{kind: [Change(**each) for each in line[kind]] for kind in kinds}}) for line in lines]


def format_table(runs: Sequence[SiteRun]) -> Iterator[str]:
    """Write a line for each row, and for each entry of clients their returns."""
    if not runs:
        return
    yield "| | sites that left (runs; rounds) | clients that left (runs; rounds) | came back | returns |"
    yield "| --- | --- | --- | --- | --- |"
    for name in ROWS:
        of_row = [run for run in runs if run.row == name]
        if of_row:
            sites, clients = ([getattr(run, f"left_by_{kind}") for run in of_row] for kind in ("sites", "clients"))
            back = sum(len(run.returned) for run in of_row)
            yield f"| {name} | {_describe(sites)} | {_describe(clients)} | {back} | {_describe_returns(of_row)} |"


def _describe(left: Sequence[Sequence[Change]]) -> str:
    """Count the runs in which each site or client left a group, and name the rounds."""
    rounds: dict[tuple[str, str], dict[int, int]] = {}
    for run, changes in enumerate(left):
        for change in changes:
            rounds.setdefault((change.client, change.group), {}).setdefault(run, change.round)
    parts = (
        f"{name} `{group}`: {len(first)} of {len(left)}; {min(first.values())} to {max(first.values())}"
        for (name, group), first in sorted(rounds.items())
    )
    return "<br>".join(parts) or "nobody"


def _describe_returns(runs: Sequence[SiteRun]) -> str:
    parts = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks.values()):
        scores = np.array([[run.scores[name] for name in run.tasks if run.tasks[name] == task] for run in runs], float)
        result = estimate(interquartile_mean, scores, generator=np.random.default_rng(0))
        parts.append(
            f"{task} {result.value:.4g} [{result.low:.4g}, {result.high:.4g}], {scores.min():.4g} to {scores.max():.4g}"
        )
    return "<br>".join(parts)


if __name__ == "__main__":
    main()
