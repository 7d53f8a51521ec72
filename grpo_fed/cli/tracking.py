"""The commands for MLflow: ui, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, report_errors, stop_when_terminated
from grpo_fed.cli.options import Debug, RunArgument, Track, TrackingFromRun, make_console


@app.command()
def ui(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run's folder; by default the latest.")] = None,
    track: Track = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="The port; by default a free one.")
    ] = None,
    browse: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    tracking_from_run: TrackingFromRun = False,
    debug: Debug = False,
) -> None:
    """Show runs in MLflow's pages, on this machine, until Ctrl-C."""
    with stop_when_terminated(), report_errors(debug, FAILED):
        from grpo_fed.runs.tracking.ui import serve

        with make_console().status("starting MLflow, which takes some seconds") as status:

            def say(line: str) -> None:
                status.stop()
                typer.echo(line)

            code = serve(run, track, port, browse, say, tracking_from_run)
    raise typer.Exit(code)


@app.command()
def replay(
    run: RunArgument, track: Track = None, tracking_from_run: TrackingFromRun = False, debug: Debug = False
) -> None:
    """Send to MLflow the records of a run that have not arrived there."""
    with report_errors(debug, FAILED):
        from grpo_fed.runs.tracking import replay as send

        count = send(run, track, from_run=tracking_from_run)
        typer.echo(f"{run}: {count:,} records sent" if count else f"{run}: no records were left to send")
