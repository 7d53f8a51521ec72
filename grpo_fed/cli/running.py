"""Commands that train."""

from __future__ import annotations

import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_fed.cli.app import app
from grpo_fed.cli.given import (
    SOURCE,
    Debug,
    Json,
    Out,
    Overrides,
    Quiet,
    Resume,
    Seed,
    fresh_folder,
    ready,
    scenario_from,
)
from grpo_fed.cli.telling import FAILED, INTERRUPTED, complain, kept, said, telling

if TYPE_CHECKING:
    from grpo_fed.progress import Display
    from grpo_fed.training import Training


@app.command()
def train(
    scenario: Annotated[str | None, typer.Argument(metavar="SCENARIO", help=SOURCE)] = None,
    overrides: Overrides = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train every client of a scenario, and save what it learned."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr if as_json else stdout):  # an environment may print
        with telling(debug):
            ready()
            training, folder = _training(scenario, overrides, seed, out, resume)
            from grpo_fed.progress import display_for

        with training:
            _run(training, folder, display_for(stdout, as_json, quiet), debug)


def _training(
    scenario: str | None, overrides: list[str] | None, seed: int | None, out: Path | None, resume: Path | None
) -> tuple[Training, Path]:
    """A new run and its folder, or one that was stopped."""
    if resume is None:
        if scenario is None:
            raise ValueError("train needs a SCENARIO, or --resume RUN; grpo-fed list names the scenarios that ship")
        settings = scenario_from(scenario, overrides, seed)
        folder = out or fresh_folder(settings)
        from grpo_fed.training import Training

        return Training(settings, folder), folder
    if not (scenario is None and overrides is None and seed is None and out is None):
        raise ValueError("--resume goes on with a run as it was begun: it takes no SCENARIO, --set, --seed or --out")
    from grpo_fed.training import Training

    return Training.resumed(resume), resume


def _run(training: Training, folder: Path, display: Display, debug: bool) -> None:
    """Train; whatever stops it, say where what was learned is."""
    from grpo_fed.progress import Opening

    display.begin(Opening(training.scenario, str(training.fleets[0].device), folder))
    try:
        training.run(display.round)
    except KeyboardInterrupt:
        display.stop()
        if training.result is not None:
            display.end(training.result)
        complain(
            f"the policies as they are and results.json are in {folder}/",
            *([f"to go on: grpo-fed train --resume {folder}"] if training.scenario.checkpoint.every else []),
            label="interrupted: ",
        )
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001, no traceback reaches a user
        display.stop()
        if training.result is not None:
            display.end(training.result)
        complain(said(error), kept(folder))
        if debug:
            traceback.print_exc()
        raise typer.Exit(FAILED) from None
    display.stop()
    assert training.result is not None
    display.end(training.result)
