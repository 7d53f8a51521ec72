"""Options that commands share, and the scenario, the folder and the process settings that they lead to."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from grpo_fed.scenario.scenario import Scenario
    from grpo_fed.scenario.unused import GivenKeys

MAX_SEED = 2**31 - 1

SCENARIO_HELP = "A TOML file, or the name of a scenario that ships."
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
ScenarioArgument = Annotated[str, typer.Argument(metavar="SCENARIO", help=SCENARIO_HELP)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, such as objective.clip=0.3; may be repeated."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, max=MAX_SEED, help="Use this seed, not the scenario's.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Track = Annotated[
    str | None,
    typer.Option(
        "--track",
        metavar="URI",
        help="An MLflow server or database, or off; by default MLFLOW_TRACKING_URI, else runs/mlflow.db.",
    ),
]
TrackingFromRun = Annotated[
    bool,
    typer.Option(
        "--tracking-from-run",
        help="Use the MLflow server or database that the run's folder names; only for a folder that you trust.",
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """The options that `run` and `train` share."""

    scenario: Annotated[str | None, typer.Argument(metavar="SCENARIO", help=SCENARIO_HELP)] = None
    overrides: Overrides = None
    seed: Seed = None
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; by default a new one in runs/.")
    ] = None
    replace: Annotated[bool, typer.Option("--replace", help="Remove the run that --out holds, if it holds one.")] = (
        False
    )
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Continue a run that was stopped, by its folder.")
    ] = None
    continued: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            metavar="RUN",
            help="Go on from the last checkpoint of a run, in a new folder; --set changes what may change.",
        ),
    ] = None
    track: Track = None
    tracking_from_run: TrackingFromRun = False
    register: Annotated[
        bool, typer.Option("--register", help="Register the clients' models in MLflow, each as SCENARIO-CLIENT.")
    ] = False
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw figures at the end.")] = True
    films: Annotated[
        bool,
        typer.Option(
            "--films/--no-films",
            help="Film the worst and the best client before and after training; not with --no-figures.",
        ),
    ] = True
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each round and for the result.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False
    debug: Debug = False


def with_run_options(command: Callable[..., None], without: Collection[str] = ()) -> Callable[..., None]:
    """Add the fields of `RunOptions` to the options of a command, which gets them as one record.

    without: fields that are no options of the command, and keep their defaults.
    command: takes the record first, then the options of its own. typer reads the options from the signature, so the
    returned function has one that lists all of them.
    """
    hints = get_type_hints(RunOptions, include_extras=True)
    shared = {
        field.name: inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(RunOptions)
        if field.name not in without
    }
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

    @wraps(command)
    def call(**values: Any) -> None:
        options = RunOptions(**{name: values.pop(name) for name in shared})
        command(options, **values)

    call.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared.values()]}
    return call


def load_scenario(source: str, overrides: list[str] | None, seed: int | None) -> Scenario:
    """Load a scenario by file or name, with the user's changes."""
    from grpo_fed.scenario.scenario import Scenario
    from grpo_fed.scenario.shipped import find_scenario

    return Scenario.load(find_scenario(source), _changes(overrides, seed))


def read_given_keys(source: str, overrides: list[str] | None, seed: int | None) -> GivenKeys:
    """Read which keys of a scenario the user wrote, in the file or name that `load_scenario` takes and as changes."""
    from grpo_fed.scenario.shipped import find_scenario
    from grpo_fed.scenario.unused import GivenKeys

    return GivenKeys.read(find_scenario(source), _changes(overrides, seed))


def _changes(overrides: list[str] | None, seed: int | None) -> list[str]:
    """List the user's changes as overrides."""
    return [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]


def prepare_process() -> None:
    """Set up the process before torch and numpy are imported.

    One thread each, since the matrices are small; user modules are imported from the current folder too, unless it is
    that of a run. Warnings of libraries are shown once.
    """
    from grpo_fed.runs.library_warnings import show_warnings_once
    from grpo_fed.scenario.importing import import_from_working_folder

    show_warnings_once()

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import_from_working_folder()


def use_no_display() -> None:
    """Let pygame draw without a window, and MuJoCo too where there is no X server."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")


def make_console() -> Console:
    """Make the console that commands print to."""
    from rich.console import Console

    return Console(highlight=False)


def startup_status(shown: bool) -> AbstractContextManager[object]:
    """Show on a terminal that the command is starting, since the first import of torch takes many seconds."""
    return make_console().status("starting") if shown and sys.stdout.isatty() else nullcontext()
