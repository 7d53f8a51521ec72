"""Compare the server's optimisers, and corrected drift, with plain averaging, on similar tasks with little experience.

Six carts with poles of different lengths, `scenarios/poles.toml`, share all blocks. Each row has the values that its
method has in the table of methods; with momentum the server goes a tenth of each difference, which adds up to the whole
of it. What is compared with `fedavg` is the mean return of the clients at the end, and over all evaluations, by seed.

    python -m benchmarks.optimisers --jobs 2

Every finished run appends a JSON line to benchmarks/results/optimisers.jsonl and is not repeated. The seeds, 1700 to
1704, and the rows were fixed beforehand; no rate was tuned for this scenario.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS, Run, Trial, read_runs, run_all, select_runs  # isort: skip  # before torch

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from grpo_fed.runs.statistics import estimate

FILE = RESULTS / "optimisers.jsonl"
SEEDS = range(1700, 1705)
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fedavg": ("fedavg", ()),
    "fedavg with momentum": ("fedavg", ("merge.optimiser=momentum", "merge.momentum=0.9", "merge.rate=0.1")),
    "fedadam": ("fedadam", ()),
    "scaffold": ("scaffold", ()),
}
"""The method of each row of the table, and what it changes."""
PLAIN = "fedavg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process with one thread")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    runs = run_all(plan_trials(), arguments.results, arguments.jobs)
    print("\n".join(format_table(runs)))


def plan_trials() -> list[Trial]:
    """List the runs, seed by seed."""
    return [Trial("poles", method, seed, overrides, row) for seed in SEEDS for row, (method, overrides) in ROWS.items()]


def read_finished_runs(path: Path = FILE) -> list[Run]:
    """Read the runs with the present settings."""
    return select_runs(plan_trials(), read_runs(path))


def format_table(runs: Sequence[Run]) -> Iterator[str]:
    """Write a row for each optimiser: its returns, and the differences to plain averaging."""
    by_row = {row: {run.seed: run for run in runs if run.variant == row} for row in ROWS}
    if not by_row[PLAIN]:
        return
    yield "| server | end | less `fedavg` | all evaluations | less `fedavg` |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for row, of_seed in by_row.items():
        seeds = [seed for seed in of_seed if seed in by_row[PLAIN]]
        if not seeds:
            continue
        cells = []
        for index in (0, 1):
            own = np.array([returns_of(of_seed[seed])[index] for seed in seeds])
            plain = np.array([returns_of(by_row[PLAIN][seed])[index] for seed in seeds])
            cells += [f"{own.mean():.0f}", "" if row == PLAIN else format_difference(own - plain)]
        yield f"| {row} | {' | '.join(cells)} |"


def returns_of(run: Run) -> tuple[float, float]:
    """Return the mean return over clients of the last evaluation, and of all after a round."""
    scores = np.array([[score for score in of_client if score is not None] for of_client in run.scores.values()])
    return float(scores[:, -1].mean()), float(scores.mean())


def format_difference(differences: np.ndarray) -> str:
    """Write the mean difference [S] by seed with its interval from resampling seeds."""
    found = estimate(_mean, differences[:, None], generator=np.random.default_rng(0))
    return f"{found.value:+.0f} [{found.low:+.0f}, {found.high:+.0f}]"


def _mean(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean((-2, -1)))


if __name__ == "__main__":
    main()
