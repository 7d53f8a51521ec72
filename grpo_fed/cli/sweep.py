"""The command that trains a scenario with many values: sweep."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, print_error, report_errors, stop_when_terminated
from grpo_fed.cli.options import Debug, Overrides, ScenarioArgument, Track, make_console, prepare_process
from grpo_fed.runs.called_as import called_as

if TYPE_CHECKING:
    from grpo_fed.reports.sweep.page import SweepResult
    from grpo_fed.reports.sweep.points import SweptRun

ROWS = 20
"""Rows that the terminal gets."""


@app.command()
def sweep(
    scenario: ScenarioArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=A,B,...", help="Values of a key, or a range such as seed=0..4; repeat it."),
    ] = None,
    optuna: Annotated[
        int | None,
        typer.Option("--optuna", metavar="N", min=1, help="Let Optuna choose N times among the values of --over."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=RANGE", help="log:1e-4..1e-2, 0.1..0.3, int:1..8 or A,B,C; repeat it."),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop trials of --optuna that are worse than half of the others.")
    ] = True,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="By default runs/sweep-SCENARIO; a sweep in it is continued."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="Runs side by side; by default one for each core."),
    ] = None,
    track: Track = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of sweep.json, and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Train a scenario with many values, side by side, and say which are best."""
    with stop_when_terminated(), report_errors(debug):
        prepare_process()
        from grpo_fed.reports.sweep.grid import sweep as sweep_grid
        from grpo_fed.reports.sweep.search import search
        from grpo_fed.runs.tracking import resolve_store
        from grpo_fed.tasks.scores import scales_of

        folder, console = out or Path("runs") / f"sweep-{Path(scenario).stem}", make_console()
        if not grid and optuna is None:
            raise ValueError("sweep needs values: --grid objective.learning_rate=1e-3,3e-3, or --optuna N with --over")
        if over and optuna is None:
            raise ValueError(f"--over {over[0]}: is for --optuna N; use --grid KEY=A,B to try all values")
        done = itertools.count(1)

        def watch(run: SweptRun) -> None:
            if not as_json:
                score = (
                    ""
                    if run.score is None
                    else f", {'normalised score' if scales_of(run.scenario) else 'return'} {run.score:.4g}"
                )
                why = f": {run.problem}" if run.problem else ""
                console.print(f"{next(done)}. {run.label}: {run.status}{score}{why}", soft_wrap=True, markup=False)

        try:
            if optuna is None:
                result = sweep_grid(scenario, grid or [], folder, overrides or [], workers, track, watch)
            else:
                result = search(
                    scenario, optuna, over or [], folder, grid or [], overrides or [], workers, track, prune, watch
                )
        except KeyboardInterrupt:
            print_error("the same command continues the sweep; runs that have ended are kept", label="interrupted: ")
            raise typer.Exit(130) from None
    with report_errors(debug, FAILED):
        _show(result, as_json, tracked=resolve_store(track) is not None)
        if any(run.status == "failed" for run in result.runs):
            raise typer.Exit(FAILED)


def _show(result: SweepResult, as_json: bool, tracked: bool) -> None:
    """Print the table, or the content of `sweep.json`."""
    import json

    if as_json:
        typer.echo(json.dumps(result.document()))
        return
    from grpo_fed.reports.sweep.page import SWEEP
    from grpo_fed.reports.tables import make_table

    table = make_table("", result.score_name, "spread", "seeds")
    table.add_column("values", overflow="fold")
    for number, row in enumerate(result.rows()[:ROWS], 1):
        table.add_row(str(number), *row)
    console = make_console()
    console.print(table)
    if len(result.points) > ROWS:
        console.print(f"and {len(result.points) - ROWS:,} more: {result.out / SWEEP}.json has all", soft_wrap=True)
    if (best := result.best) is not None:
        changes = " ".join(f"--set {key}={value}" for key, value in best.values)
        console.print(f"best: {changes or 'as it is'}", style="bold", soft_wrap=True, markup=False)
    for problem in result.problems:
        print_error(problem, label="note: ")
    typer.echo(f"{result.out / SWEEP}.md and .json")
    if result.note:
        print_error(result.note, label="note: ")
    elif tracked:
        typer.echo(f"MLflow: {called_as()} ui; the view sweep {result.out.name} shows these runs alone")
