"""The command that repeats a run whose rounds did not wait: replay-order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import report_errors
from grpo_fed.cli.options import Debug, RunArgument, make_console, prepare_process


@app.command(name="replay-order")
def repeat_order(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="The repeated run's folder; by default RUN-replayed.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Remove a run that the folder holds.")] = False,
    debug: Debug = False,
) -> None:
    """Repeat a run with round.mode = "buffered" in the order in which its clients answered, and compare the bits."""
    with report_errors(debug):
        prepare_process()
        from grpo_fed.engines.replay_order import replay_order

        folder = out or run.resolve().with_name(f"{run.resolve().name}-replayed")
        with make_console().status("repeating") as status:
            repeated = replay_order(
                run, folder, replace, lambda record: status.update(f"repeating merge {record.round}/{record.rounds}")
            )
        if repeated.first_difference is None:
            typer.echo(f"{run}: all {repeated.merges} merges have the same bits in {folder}")
            return
        typer.echo(f"{run}: from merge {repeated.first_difference} on the shared blocks have other bits in {folder}")
        raise typer.Exit(1)
