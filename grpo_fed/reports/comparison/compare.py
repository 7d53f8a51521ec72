"""Runs methods with the same scenario and seeds, resumes a comparison that was stopped, and writes the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from grpo_fed.reports.axis import AxisName
from grpo_fed.reports.comparison.page import (
    COMPARISON,
    comparison_latex,
    comparison_markdown,
    draw_adaptations,
    draw_comparison,
)
from grpo_fed.reports.comparison.profiles import draw_improvement, draw_profiles
from grpo_fed.reports.comparison.verdicts import ComparedRun, Comparison, method_results
from grpo_fed.reports.figures.write import FIGURES, write_drawings
from grpo_fed.reports.formatting import format_names
from grpo_fed.reports.paper import PaperStyle, write_paper_figures
from grpo_fed.runs import checkpoint
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import PAPER, SCENARIO
from grpo_fed.runs.history import read_history
from grpo_fed.runs.records import record_to_line
from grpo_fed.runs.results import ENDED, Result, Status, read_results
from grpo_fed.runs.tracking import Tracker
from grpo_fed.runs.tracking.groups import RunGroup
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

BASELINE = "local"
"""The default baseline, if it is among the methods."""

Run = Callable[[Scenario, Path], object]
"""Runs a scenario in a folder; the folder may hold a run of the scenario that was stopped."""


def compare(
    scenario: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    run: Run | None = None,
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    watch: Callable[[ComparedRun], None] = lambda compared_run: None,
    axis: AxisName = "rounds",
    paper: PaperStyle | None = None,
) -> Comparison:
    """Run every method with every seed, each in `out/<method>/seed-<n>/`, and write the comparison to `out`.

    Runs that have finished are not repeated, so the same call resumes a comparison that was stopped, and a call with
    more methods or seeds extends it. A run that fails is left out of the numbers and named; the others go on.

    scenario: a file, or the name of a scenario that ships. run: runs one of the runs, by default on the local engine,
    which also resumes. overrides: changes for every run, such as "rounds=5". baseline: the method that the others are
    compared with, by default `local` if it is among them, else the first. watch: called with every run when it ends.
    axis: what the horizontal axis of the curves counts. paper: write the figures for a paper too.

    ValueError, before anything is run, for a mistake in a scenario, or a folder that holds a run of another one.
    """
    out, run = Path(out), run or run_locally
    _check_arguments(methods, seeds, baseline)
    source = find_scenario(str(scenario))
    planned = []
    for method in methods:
        for seed in seeds:
            settings = Scenario.load(source, [*overrides, f"method={method}", f"seed={seed}"])
            planned.append((settings, ComparedRun(method, seed, _folder(out, method, seed))))
    for settings, compared_run in planned:
        _check_same_scenario(settings, compared_run.folder)
    runs = []
    for settings, compared_run in planned:
        folder = compared_run.folder
        problem = "" if _has_finished(folder) else _try_run(run, settings, folder)
        runs.append(replace(compared_run, problem=problem or _describe_missing_scores(folder)))
        watch(runs[-1])
    baseline = baseline or (BASELINE if BASELINE in methods else methods[0])
    results = tuple(method_results(runs, methods, baseline))
    comparison = Comparison(planned[0][0], baseline, tuple(seeds), results, tuple(runs), out)
    write_atomic(out / f"{COMPARISON}.json", json.dumps(comparison.document(), indent=2, allow_nan=False) + "\n")
    draws = (partial(draw_comparison, axis=axis), draw_profiles, draw_improvement, draw_adaptations)
    figures = [figure for draw in draws if (figure := draw(comparison)) is not None]
    if figures:
        (out / FIGURES).mkdir(exist_ok=True)
        write_drawings(out / FIGURES, figures)
    if paper is not None:
        (out / PAPER).mkdir(exist_ok=True)
        write_paper_figures(out / PAPER, figures, paper)
    write_atomic(out / f"{COMPARISON}.tex", comparison_latex(comparison))
    write_atomic(out / f"{COMPARISON}.md", comparison_markdown(comparison))
    return comparison


def run_locally(
    scenario: Scenario,
    folder: Path,
    workers: int | None = None,
    track: str | None = "off",
    group: RunGroup | None = None,
) -> Result:
    """Run a scenario on the local engine, or resume the run in the folder.

    track: where MLflow keeps the run; `off` for nowhere. group: the comparison that it belongs to there.
    """
    from grpo_fed.engines.local.engine import LocalEngine

    resumed = checkpoint.latest(folder) is not None
    named = None if group is None else group.with_label(f"{scenario.method} seed {scenario.seed}")
    tracker = Tracker.open(track, folder, scenario, resumed=resumed, models=False, group=named)
    status: Status = "failed"
    with (
        LocalEngine.resumed(folder)
        if resumed
        else LocalEngine(scenario, folder, workers=workers, replace=True) as engine
    ):
        try:
            result = engine.run(lambda record: tracker.round(record_to_line(record)))
            status = result.status
            return result
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            tracker.close(None if engine.result is None else engine.result.to_json(), status)


def _check_arguments(methods: Sequence[str], seeds: Sequence[int], baseline: str | None) -> None:
    """Raise a ValueError for an empty list, a repetition, or a baseline that is not among the methods."""
    if not methods or not seeds:
        raise ValueError(f"methods {list(methods)} and seeds {list(seeds)}: a comparison needs at least one of each")
    for what, values in (("methods", methods), ("seeds", seeds)):
        repeated = [value for value in values if list(values).count(value) > 1]
        if repeated:
            raise ValueError(f"{what}: {repeated[0]} is listed twice")
    if baseline is not None and baseline not in methods:
        raise ValueError(f"baseline {baseline}: is not among the methods {', '.join(methods)}")


def _folder(out: Path, method: str, seed: int) -> Path:
    """Name the folder of a run; a user's own method is `module:NAME`, and not every file system allows colons."""
    return out / method.replace(":", ".") / f"seed-{seed}"


def _check_same_scenario(scenario: Scenario, folder: Path) -> None:
    """Raise a ValueError if the folder holds a run of another scenario."""
    path = folder / SCENARIO
    if path.is_file() and path.read_text(encoding="utf-8") != scenario.dumps():
        raise ValueError(f"{folder}: holds a run of another scenario; name another folder for this comparison")


def _has_finished(folder: Path) -> bool:
    results = read_results(folder)
    return results is not None and results["status"] in ENDED


def _try_run(run: Run, scenario: Scenario, folder: Path) -> str:
    """Run a scenario; return why it failed in one line, or an empty text."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        run(scenario, folder)
    except Exception as error:  # noqa: BLE001, whatever stops a run, the others are still worth having
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if _has_finished(folder) else "it did not finish"


def _describe_missing_scores(folder: Path) -> str:
    """Name the clients of a run without a final return; an empty text if there are none."""
    history = read_history(folder)
    names = [name for name, score in zip(history.clients, history.after, strict=True) if not np.isfinite(score)]
    if not names and history.scenario.evaluate.adapt:
        is_known = np.isfinite(history.adapted_last).all(axis=1)
        names = [name for name, known in zip(history.clients, is_known, strict=True) if not known]
        return f"no returns of the adaptation of {format_names(names, 5)}" if names else ""
    return f"no final return of {format_names(names, 5)}" if names else ""
