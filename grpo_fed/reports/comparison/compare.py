"""Methods side by side: the same scenario and seeds for each, run, gone on with, and written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from grpo_fed.reports.comparison.page import COMPARISON, curves, markdown
from grpo_fed.reports.comparison.verdicts import ComparedRun, Comparison, method_results
from grpo_fed.reports.figures import FIGURES, write
from grpo_fed.runs import checkpoint
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.runs.history import read_history
from grpo_fed.runs.records import record_to_line
from grpo_fed.runs.results import Result, Status, read_results
from grpo_fed.runs.tracking import Tracker
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

BASELINE = "local"
"""The method that the others are held against, where it is among them."""

Run = Callable[[Scenario, Path], object]
"""Runs a scenario and leaves a run folder; what is there of it already may be gone on with."""


def compare(
    scenario: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    run: Run | None = None,
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    watch: Callable[[ComparedRun], None] = lambda trial: None,
) -> Comparison:
    """Run every method with every seed, each in `out/<method>/seed-<n>/`, and write what comes of it to `out`.

    scenario: a file or the name of one that ships, with `overrides` such as "rounds=5" for every run. What has finished
    is not run again, so that a comparison that was stopped goes on when it is asked for again; more methods and seeds
    may be asked for. By default runs are the local engine's, and one that was stopped goes on; `run` is another way to
    run one. A run that fails is left out and named, and the others go on. `watch` hears of every trial when it
    is over. ValueError, before anything is run, for what is wrong with a scenario, and for a folder that holds the run
    of another one.
    """
    out, run = Path(out), run or run_locally
    _refuse_unusable(methods, seeds, baseline)
    source = find_scenario(str(scenario))
    planned = []
    for method in methods:
        for seed in seeds:
            loaded = Scenario.load(source, [*overrides, f"method={method}", f"seed={seed}"])
            planned.append((loaded, ComparedRun(method, seed, _home(out, method, seed))))
    for loaded, trial in planned:
        _check_same_scenario(loaded, trial.folder)
    trials = []
    for loaded, trial in planned:
        if not _has_finished(trial.folder):
            problem = _run(run, loaded, trial.folder)
            trial = ComparedRun(trial.method, trial.seed, trial.folder, problem)
        if not trial.problem:
            trial = ComparedRun(trial.method, trial.seed, trial.folder, _incomplete(trial.folder))
        trials.append(trial)
        watch(trial)
    base = baseline or (BASELINE if BASELINE in methods else methods[0])
    found = Comparison(
        planned[0][0], base, tuple(seeds), tuple(method_results(trials, methods, base)), tuple(trials), out
    )
    write_atomic(out / f"{COMPARISON}.json", json.dumps(found.document(), indent=2, allow_nan=False) + "\n")
    figure = curves(found)
    if figure is not None:
        (out / FIGURES).mkdir(exist_ok=True)
        write(out / FIGURES, [figure])
    write_atomic(out / f"{COMPARISON}.md", markdown(found))
    return found


def _home(out: Path, method: str, seed: int) -> Path:
    """Of one run; a method of the user's own is `module:NAME`, and not every file system has colons."""
    return out / method.replace(":", ".") / f"seed-{seed}"


# Running --------------------------------------------------------------------------------------------------------------


def _refuse_unusable(methods: Sequence[str], seeds: Sequence[int], baseline: str | None) -> None:
    if not methods or not seeds:
        raise ValueError(f"methods {list(methods)} and seeds {list(seeds)}: a comparison needs one of each or more")
    for what, given in (("methods", methods), ("seeds", seeds)):
        twice = [one for one in given if list(given).count(one) > 1]
        if twice:
            raise ValueError(f"{what}: {twice[0]} stands there twice; say it once")
    if baseline is not None and baseline not in methods:
        raise ValueError(f"baseline {baseline}: is not among the methods {', '.join(methods)}")


def _check_same_scenario(scenario: Scenario, folder: Path) -> None:
    """A folder with the run of another scenario than this."""
    path = folder / SCENARIO
    if path.is_file() and path.read_text(encoding="utf-8") != scenario.dumps():
        raise ValueError(f"{folder}: holds a run of another scenario; name another folder for this comparison")


def _has_finished(folder: Path) -> bool:
    results = read_results(folder)
    return results is not None and results["status"] == "finished"


def run_locally(scenario: Scenario, folder: Path, workers: int | None = None, track: str | None = "off") -> Result:
    """On the local engine: anew, or on from where it was stopped; tracked in MLflow unless `track` is off."""
    from grpo_fed.engines.local.engine import LocalEngine

    begun = checkpoint.latest(folder) is not None
    tracker = Tracker.open(track, folder, scenario, resumed=begun, models=False)
    status: Status = "failed"
    with LocalEngine.resumed(folder) if begun else LocalEngine(scenario, folder, workers=workers) as federation:
        try:
            result = federation.run(lambda note: tracker.round(record_to_line(note)))
            status = "finished"
            return result
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            tracker.close(None if federation.result is None else federation.result.to_json(), status)


def _run(run: Run, scenario: Scenario, folder: Path) -> str:
    """Why it failed, in a line; empty if it did not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        run(scenario, folder)
    except Exception as error:  # noqa: BLE001 - whatever a run dies of, the others are worth having
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if _has_finished(folder) else "it did not finish"


def _incomplete(folder: Path) -> str:
    """Which clients have no score."""
    history = read_history(folder)
    without = [name for name, score in zip(history.clients, history.after, strict=True) if not np.isfinite(score)]
    if not without:
        return ""
    names = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
    return f"no final return of {names}"
