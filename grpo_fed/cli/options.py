"""What commands have in common: their options, and the scenario and the folder that these come to."""

from __future__ import annotations

import itertools
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from grpo_fed.scenario.scenario import Scenario

SEEDS = 2**31 - 1

SOURCE = "A TOML file, or the name of a scenario that ships."
ScenarioArgument = Annotated[str, typer.Argument(metavar="SCENARIO", help=SOURCE)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, such as objective.clip=0.3; may be repeated."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, max=SEEDS, help="Instead of the scenario's.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of what went wrong.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default in runs/.")]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with a run that was stopped.")]
Track = Annotated[
    str | None,
    typer.Option(
        "--track",
        metavar="URI",
        help="An MLflow server or database, or off; by default MLFLOW_TRACKING_URI, else runs/mlflow.db.",
    ),
]
Figures = Annotated[bool, typer.Option("--figures/--no-figures", help="Draw figures in the end.")]
Films = Annotated[
    bool,
    typer.Option("--films/--no-films", help="With figures: short films of the worst and the best, before and after."),
]
Json = Annotated[bool, typer.Option("--json", help="A JSON line for each round and for the result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")]


def getting_ready(shown: bool) -> AbstractContextManager[object]:
    """On a terminal, a sign of life: where torch has never been read, its import alone takes many seconds."""
    return make_console().status("getting ready") if shown and sys.stdout.isatty() else nullcontext()


def prepare_process() -> None:
    """Before torch and numpy are there: a thread each, as matrices are small, and modules of the user's own here."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def use_no_display() -> None:
    """Pictures need none: pygame is to look for no window, and MuJoCo for none where there is no X server."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")


def scenario_from(source: str, overrides: list[str] | None, seed: int | None) -> Scenario:
    """What the user named, with what the user changed."""
    from grpo_fed.scenario.scenario import Scenario
    from grpo_fed.scenario.shipped import find_scenario

    changes = [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]
    return Scenario.load(find_scenario(source), changes)


def fresh_folder(scenario: Scenario) -> Path:
    """One that is not there yet, `runs/<scenario>-<seed>-<time>`."""
    name = f"{scenario.name}-{scenario.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def make_console() -> Console:
    """What commands print to."""
    from rich.console import Console

    return Console(highlight=False)
