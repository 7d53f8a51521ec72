"""The commands that read runs: a page about one, and methods side by side: report, compare."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, print_error, report_errors, stop_when_terminated
from grpo_fed.cli.options import (
    Debug,
    Overrides,
    RunArgument,
    ScenarioArgument,
    Track,
    load_scenario,
    make_console,
    prepare_process,
    use_no_display,
)
from grpo_fed.runs.called_as import called_as

if TYPE_CHECKING:
    from rich.table import Table

    from grpo_fed.reports.comparison.verdicts import Comparison
    from grpo_fed.scenario.scenario import Scenario


XOption = Annotated[
    Literal["rounds", "steps", "bytes"],
    typer.Option("--x", help="What the horizontal axis counts: rounds, steps or bytes of all clients."),
]
PaperOption = Annotated[
    str | None,
    typer.Option(
        "--paper",
        metavar="NAME",
        help="Also write figures for a paper, as PDF and PGF with captions apart: article, neurips, iclr, icml, ieee,"
        " acm, jmlr; icml-wide, ieee-wide and acm-wide go over both columns.",
    ),
]
WIDE = 100
"""Columns of a terminal that has room for the returns of the scenario's entries."""


@app.command()
def report(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; by default report.html in the run's folder.")
    ] = None,
    episodes: Annotated[
        bool,
        typer.Option("--episodes/--no-episodes", help="Film the worst and the best client before and after training."),
    ] = True,
    x: XOption = "rounds",
    paper: PaperOption = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Also write rounds.csv and clients.csv.")] = False,
    debug: Debug = False,
) -> None:
    """Draw the figures and films of a run, and put them on one page that can be read without a network."""
    with report_errors(debug):
        prepare_process()
        use_no_display()
        from grpo_fed.reports.axis import x_axis
        from grpo_fed.reports.episodes import film_episodes
        from grpo_fed.reports.figures.write import draw_figures
        from grpo_fed.reports.formatting import format_count
        from grpo_fed.reports.page import write_page
        from grpo_fed.reports.paper import find_paper, write_paper
        from grpo_fed.reports.summary import write_summary
        from grpo_fed.runs.csv_tables import write_csv
        from grpo_fed.runs.history import read_history

        style = None if paper is None else find_paper(paper)
        history = replace(read_history(run), axis=x)
        x_axis(history)
        console = make_console()
        with console.status("drawing figures"):
            figures = {path.stem for path in draw_figures(history)}
        if style is not None:
            with console.status("drawing figures for a paper"):
                written = write_paper(history, style)
            typer.echo(f"{written[0].parent}/: {len(figures)} figures as PDF and PGF; {written[-1]} has their captions")
        for path in write_csv(run) if as_csv else ():
            typer.echo(str(path))
        if episodes:
            with console.status("filming"):
                filmed = film_episodes(run)
            for problem in filmed.problems:
                typer.echo(problem, err=True)
        write_summary(run)
        page = write_page(history, out)
        count = format_count(len(figures), "figure")
        typer.echo(f"{page}: a page with {count}; their files are in {run / 'figures'}/")


@app.command()
def compare(
    scenario: ScenarioArgument,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help="Names of methods, separated by commas.")
    ] = "local,fedavg,grpo",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Seeds 0 to N - 1 for each method.")] = 5,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="METHOD",
            help="The method that the others are compared with; by default local, else the first.",
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="By default runs/compare-SCENARIO; an unfinished comparison in it is continued.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=0, help="Processes; by default one for each core.")
    ] = None,
    x: XOption = "rounds",
    paper: PaperOption = None,
    track: Track = None,
    debug: Debug = False,
) -> None:
    """Run methods side by side with the same scenario and seeds, and say which differ."""
    with stop_when_terminated(), report_errors(debug):
        prepare_process()
        from grpo_fed.reports.comparison.compare import compare as compare_methods
        from grpo_fed.reports.comparison.compare import run_locally
        from grpo_fed.reports.comparison.page import COMPARISON
        from grpo_fed.reports.comparison.verdicts import ComparedRun
        from grpo_fed.reports.paper import find_paper
        from grpo_fed.runs.tracking import resolve_store
        from grpo_fed.runs.tracking.groups import finish_group, open_group

        folder = out or Path("runs") / f"compare-{Path(scenario).stem}"
        names = [name.strip() for name in methods.split(",") if name.strip()]
        console = make_console()

        style = None if paper is None else find_paper(paper)
        store, experiment = resolve_store(track), load_scenario(scenario, overrides, None).name
        done = itertools.count(1)

        def run(settings: Scenario, run_folder: Path) -> object:
            group = None if store is None else open_group(folder, "compare", experiment)
            return run_locally(settings, run_folder, workers, track, group)

        with console.status(_count_line(0, len(names) * seeds)) as status:

            def watch(compared_run: ComparedRun) -> None:
                status.update(_count_line(next(done), len(names) * seeds))
                outcome = compared_run.problem or "done"
                console.print(f"{compared_run.method} seed {compared_run.seed}: {outcome}", soft_wrap=True)

            comparison = compare_methods(
                scenario, names, range(seeds), folder, run, overrides or [], baseline, watch, x, style
            )
    with report_errors(debug, FAILED):
        console.print(_table(comparison, wide=console.width >= WIDE))
        typer.echo(f"{folder / COMPARISON}.md, .tex and .json; curves and profiles in {folder / 'figures'}/")
        if store is not None:
            group = open_group(folder, "compare", experiment)
            page = (folder / f"{COMPARISON}.md").read_text(encoding="utf-8")
            if note := finish_group(group, store, folder, page, {}):
                print_error(note, label="note: ")
            else:
                typer.echo(f"MLflow: {called_as()} ui; the view {group.name} shows these runs alone")


def _count_line(done: int, runs: int) -> str:
    return f"{done:,} of {runs:,} runs are done; after Ctrl-C the same command continues"


def _table(comparison: Comparison, wide: bool) -> Table:
    """Make a row for each method; wide: with the returns of the scenario's entries."""
    from grpo_fed.reports.comparison.page import format_interval
    from grpo_fed.reports.formatting import format_return
    from grpo_fed.reports.tables import make_table

    entries = dict.fromkeys(name for method in comparison.methods for name in method.entries) if wide else {}
    updates = comparison.scenario.evaluate.adapt
    adapted = ("before adaptation", f"after {updates:,}") if updates else ()
    table = make_table(
        "method", f"{comparison.score_name} [95 %]", *entries, *adapted, f"beats {comparison.baseline} [95 %]"
    )
    table.add_column("verdict")
    for method in comparison.methods:
        returns = [format_return(method.entries.get(name)) for name in entries]
        better = format_interval(method.better, "{:.2f}".format)
        if updates:
            returns += [format_interval(method.adapted(number), format_return) for number in (0, updates)]
        table.add_row(method.method, format_interval(method.iqm, format_return), *returns, better, method.verdict)
    return table
