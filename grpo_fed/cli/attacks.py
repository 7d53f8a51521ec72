"""The command that plays attacks against merge rules: attack-board."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import report_errors, stop_when_terminated
from grpo_fed.cli.options import Debug, Overrides, ScenarioArgument, prepare_process

if TYPE_CHECKING:
    from grpo_fed.reports.attack_board import BoardRun


@app.command("attack-board")
def attack_board(
    scenario: ScenarioArgument,
    attacks: Annotated[
        str, typer.Option("--attacks", metavar="A,B,...", help="Attacks, separated by commas; by default all.")
    ] = "",
    rules: Annotated[
        str,
        typer.Option(
            "--rules", metavar="A,B,...", help="Merge rules; mix+RULE mixes replies first. By default the robust ones."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Number of seeds.")] = 3,
    first: Annotated[int, typer.Option("--first-seed", metavar="N", min=0, help="The first of the seeds.")] = 0,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="By default runs/attacks-SCENARIO; a board in it is continued."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Processes; by default one for each core.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Play attacks against merge rules in a scenario with hostile clients, and show what is left of the return."""
    with stop_when_terminated(), report_errors(debug):
        prepare_process()
        from grpo_fed.reports.attack_board import ATTACKS, BOARD, DEFAULT_RULES, board_lines, play_attacks

        def watch(run: BoardRun) -> None:
            typer.echo(f"{run.attack} against {run.rule}, seed {run.seed}: {run.score:.4g}", err=True)

        folder = out or Path("runs") / f"attacks-{Path(scenario).stem}"
        board = play_attacks(
            scenario,
            _names(attacks) or ATTACKS,
            _names(rules) or DEFAULT_RULES,
            range(first, first + seeds),
            folder,
            overrides or [],
            workers,
            watch,
        )
        for line in board_lines(board):
            typer.echo(line)
        typer.echo(f"{folder / BOARD}.md, .png and .svg")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
