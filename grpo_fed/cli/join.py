"""The command by which newcomers join a run that has ended: join."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.options import RunArgument, RunOptions, with_run_options
from grpo_fed.cli.run import Trainer, run_command

if TYPE_CHECKING:
    from grpo_fed.engines.start import Engine
    from grpo_fed.scenario.scenario import Scenario


@app.command()
@partial(with_run_options, without=("scenario", "seed", "resume", "continued", "tracking_from_run"))
def join(
    options: RunOptions,
    run: RunArgument,
    client: Annotated[
        list[str],
        typer.Option(
            "--client",
            metavar="TABLE",
            help='A newcomer, as in [[clients]]: \'{ name = "new", env = "CartPole-v1" }\'; may be repeated.',
        ),
    ],
) -> None:
    """Go on with a run that has ended and more clients, which begin with the shared blocks."""

    def start(scenario: Scenario, folder: Path, replace: bool) -> Engine:
        raise AssertionError("a run that is joined goes on")

    def resume(folder: Path) -> Engine:
        from grpo_fed.engines.start import resume_engine

        return resume_engine(folder, "local", None)

    trainer = Trainer("run", start, resume, federated=True, newcomers=tuple(client))
    run_command(trainer, replace(options, continued=run))
