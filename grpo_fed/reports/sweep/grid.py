"""All combinations of some values, each with all seeds: plans the runs, trains those left, writes the table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_fed.reports.sweep.page import SweepResult, rank_points, write_sweep
from grpo_fed.reports.sweep.points import SweptRun, folder_name, make_run
from grpo_fed.reports.sweep.pool import RunPool, count_processes
from grpo_fed.reports.sweep.values import Axis, check_keys
from grpo_fed.runs.tracking.groups import GROUP_FILE, RunGroup, finish_group, open_group
from grpo_fed.runs.tracking.store import resolve_store
from grpo_fed.scenario.shipped import find_scenario

MOST_RUNS = 100_000
"""Runs of a sweep; more are hardly meant."""
LOG = "workers.log"
"""The file with what the processes print."""

Watch = Callable[[SweptRun], None]


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a grid, checked before any of them begins."""

    runs: tuple[SweptRun, ...]
    out: Path

    @classmethod
    def make(cls, scenario: str | Path, axes: Sequence[Axis], overrides: Sequence[str], out: Path) -> SweepPlan:
        """Plan all combinations, the seeds innermost; ValueError names a key or value that is wrong.

        axes: that of `seed`, if there is one, gives each combination its seeds; otherwise it has the scenario's.
        """
        check_keys([axis.key for axis in axes], "--grid")
        check_folder(out)
        source = find_scenario(str(scenario))
        seeds: Sequence[str | None] = next((axis.values for axis in axes if axis.key == "seed"), (None,))
        others = [axis for axis in axes if axis.key != "seed"]
        count = len(seeds)
        for axis in others:
            count *= len(axis.values)
        if count > MOST_RUNS:
            raise ValueError(f"--grid: {count:,} runs are more than {MOST_RUNS:,}; give fewer values")
        runs = []
        for values in itertools.product(*([(axis.key, value) for value in axis.values] for axis in others)):
            folder = out / folder_name(values)
            runs += [make_run(source, overrides, values, seed, folder, "--grid") for seed in seeds]
        return cls(tuple(runs), out)


def sweep(
    scenario: str | Path,
    grid: Sequence[str],
    out: str | Path,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    track: str | None = "off",
    watch: Watch = lambda run: None,
) -> SweepResult:
    """Train a scenario with all combinations of values, and write `sweep.json` and `sweep.md` to `out`.

    Each run is in `out/VALUES/seed-N/`. Runs that have ended are not repeated and others are resumed, so the same call
    continues a sweep that was stopped, and several processes may share a sweep. A run that fails is named in the table.

    scenario: a file, or the name of a scenario that ships. grid: such as "objective.learning_rate=1e-3,3e-3" and
    "seed=0..4". overrides: changes for every run, such as "rounds=5". workers: processes, by default one for each core.
    track: where MLflow keeps the runs, under one parent; "off" for nowhere. watch: called with every run when it ends.
    ValueError, before anything is trained, for a mistake in a value, or a folder that holds something else.
    """
    plan = SweepPlan.make(scenario, [Axis.parse(text) for text in grid], overrides, Path(out))
    store = resolve_store(track)
    group = open_group(plan.out, "sweep", plan.runs[0].scenario.name) if store is not None else None

    def group_of(run: SweptRun) -> RunGroup | None:
        return None if group is None else group.with_label(run.short_label)

    with RunPool(count_processes(workers, len(plan.runs)), plan.out / LOG) as pool:
        runs = pool.train_all(plan.runs, track, group_of, watch)
    result = SweepResult(plan.runs[0].scenario, rank_points(runs), tuple(runs), plan.out)
    write_sweep(result)
    if group is not None and store is not None:
        result = result.with_note(finish_group(group, store, plan.out, result.page(), result.metrics()))
    return result


def check_folder(out: Path) -> None:
    """ValueError for a folder that cannot hold a sweep."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; a sweep needs a folder")
    if out.is_dir() and any(out.iterdir()) and not ((out / LOG).exists() or (out / GROUP_FILE).exists()):
        raise ValueError(f"{out}: is not empty and holds no sweep; name another folder with --out")
