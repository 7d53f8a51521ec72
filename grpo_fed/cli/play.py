"""The command that plays episodes with a run's policies: play."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, report_errors
from grpo_fed.cli.options import MAX_SEED, Debug, RunArgument, make_console, prepare_process, use_no_display


@app.command()
def play(
    run: RunArgument,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="One client; by default all.")] = None,
    episodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Episodes of each client; by default as in the scenario.")
    ] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="Sample actions instead of taking the likeliest.")] = False,
    gif: Annotated[Path | None, typer.Option(metavar="FILE", help="Film an episode of one client.")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Play other episodes than the run evaluated.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Play episodes with the policies of a run, and print their returns."""
    with report_errors(debug):
        prepare_process()
        use_no_display()
        from grpo_fed.reports.film import check_path, film
        from grpo_fed.runs.folder import read_client_names
        from grpo_fed.runs.policies import load_policy

        names = read_client_names(run) if client is None else [client]
        if gif is not None:
            if len(names) > 1:
                raise ValueError(f"--gif films one client: add --client NAME, one of {', '.join(names)}")
            check_path(gif)
        policies = [load_policy(run, name) for name in names]
    with report_errors(debug, FAILED):
        from grpo_fed.reports.formatting import format_return
        from grpo_fed.reports.tables import make_table

        console = make_console()
        table = make_table("client", "mean", "std", "min", "max", "episodes", "mean steps")
        with console.status("playing"):
            for policy in policies:
                evaluation = policy.play(episodes, not sampled, seed)
                scores = evaluation.scores
                returns = [evaluation.score, scores.std(), scores.min(), scores.max()]
                cells = [*(format_return(float(value)) for value in returns), f"{len(scores)}"]
                table.add_row(evaluation.client, *cells, f"{evaluation.lengths.mean():,.1f}")
        console.print(table)
        if gif is not None:
            with console.status("filming"):
                made = film(policies[0], gif, not sampled, seed)
            score = format_return(made.score)
            typer.echo(f"{gif}: {made.length:,} steps, return {score}, {made.frames:,} pictures")
