"""Commands that look back on runs: a page of one, and methods side by side."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, report_errors
from grpo_fed.cli.options import (
    Debug,
    Overrides,
    ScenarioArgument,
    Track,
    make_console,
    prepare_process,
    use_no_display,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from grpo_fed.reports.comparison.verdicts import Comparison
    from grpo_fed.runs.statistics import Estimate


WIDE = 100
"""Columns of a terminal."""


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that a run left.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="By default report.html in it.")] = None,
    episodes: Annotated[
        bool, typer.Option("--episodes/--no-episodes", help="Film the worst and the best client, before and after.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Draw a run's figures and films, and make one page of all: no network is needed to read it."""
    with report_errors(debug):
        prepare_process()
        use_no_display()
        from grpo_fed.reports.episodes import film_episodes
        from grpo_fed.reports.figures import draw_figures
        from grpo_fed.reports.page import write_page as page
        from grpo_fed.reports.summary import write_summary

        console = make_console()
        with console.status("drawing"):
            figures = draw_figures(run)
        if episodes:
            with console.status("filming"):
                filmed = film_episodes(run)
            for note in filmed.notes:
                typer.echo(note, err=True)
        write_summary(run)
        typer.echo(f"{page(run, out)}: a page with {len(figures)} figures; each is in {run / 'figures'}/ too")


@app.command()
def compare(
    scenario: ScenarioArgument,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help="As the table of methods names them.")
    ] = "local,fedavg,grpo",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Seeds 0 to N - 1 for each method.")] = 5,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="METHOD", help="What the others are held against.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="By default runs/compare-SCENARIO; asked again, it goes on."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=0, help="Processes; by default one for a core.")
    ] = None,
    track: Track = None,
    debug: Debug = False,
) -> None:
    """Run methods side by side, with the same scenario and seeds, and say which differ."""
    with report_errors(debug):
        prepare_process()
        from grpo_fed.reports.comparison.compare import compare as side_by_side
        from grpo_fed.reports.comparison.compare import run_locally
        from grpo_fed.reports.comparison.page import COMPARISON
        from grpo_fed.reports.comparison.verdicts import ComparedRun
        from grpo_fed.runs.tracking import resolve_store

        folder = out or Path("runs") / f"compare-{Path(scenario).stem}"
        names = [name.strip() for name in methods.split(",") if name.strip()]
        console = make_console()

        run, done = partial(run_locally, workers=workers, track=track), itertools.count(1)
        with console.status(_so_far(0, len(names) * seeds)) as status:

            def told(trial: ComparedRun) -> None:
                status.update(_so_far(next(done), len(names) * seeds))
                console.print(f"{trial.method} seed {trial.seed}: {trial.problem or 'done'}", soft_wrap=True)

            found = side_by_side(scenario, names, range(seeds), folder, run, overrides or [], baseline, told)
    with report_errors(debug, FAILED):
        console.print(_table(found, wide=console.width >= WIDE))
        typer.echo(f"{folder / COMPARISON}.md and .json, and the curves beside them")
        if resolve_store(track) is not None:
            typer.echo("MLflow: grpo-fed ui; the view By method has all of them")


def _so_far(done: int, runs: int) -> str:
    return f"{done:,} of {runs:,} runs are done; stopped, it goes on when it is asked again"


def _table(found: Comparison, wide: bool) -> Table:
    """A row for each method; where there is room, with the returns of the scenario's entries."""
    from grpo_fed.reports.tables import number, table_of

    def shown(one: Estimate | None, show: Callable[[float], str]) -> str:
        return "-" if one is None else f"{show(one.value)} [{show(one.low)}, {show(one.high)}]"

    entries = list(dict.fromkeys(name for one in found.methods for name in one.entries)) if wide else []
    table = table_of("method", "return [95 %]", *entries, f"beats {found.baseline} [95 %]")
    table.add_column("verdict")
    for one in found.methods:
        parts = [number(one.entries.get(name)) for name in entries]
        row = one.method, shown(one.iqm, number), *parts, shown(one.better, "{:.2f}".format), one.verdict
        table.add_row(*row)
    return table
