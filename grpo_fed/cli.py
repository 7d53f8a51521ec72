"""The command line.

Nothing here imports what a command does not need: `--help` comes without torch. Exit codes: 0 all is well, 1 a run
failed, 2 the scenario or the call is wrong and nothing was started or written, 130 Ctrl-C.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from grpo_fed.progress import Display
    from grpo_fed.scenario import Scenario
    from grpo_fed.training import Training

FAILED, WRONG, INTERRUPTED = 1, 2, 130
SEEDS = 2**31 - 1

app = typer.Typer(
    name="grpo-fed",
    help="Federated multi-task reinforcement learning: policies cut into blocks, shared where sharing pays.",
    epilog="Begin with: grpo-fed train cartpole",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SOURCE = "A TOML file, or the name of a scenario that ships."
Source = Annotated[str, typer.Argument(metavar="SCENARIO", help=SOURCE)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, such as objective.clip=0.3; may be repeated."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, max=SEEDS, help="Instead of the scenario's.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of what went wrong.")]


def main() -> None:
    """What `grpo-fed` runs."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without such letters gets "?"
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"grpo-fed {version('grpo-fed')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show it and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def train(
    scenario: Annotated[str | None, typer.Argument(metavar="SCENARIO", help=SOURCE)] = None,
    overrides: Overrides = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder; by default in runs/.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each round and for the result.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
    debug: Debug = False,
) -> None:
    """Train every client of a scenario, and save what it learned."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr if as_json else stdout):  # an environment may print
        with telling(debug):
            _ready()
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
        settings = _scenario(scenario, overrides, seed)
        folder = out or _fresh_folder(settings)
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
        _complain(
            f"the policies as they are and results.json are in {folder}/",
            *([f"to go on: grpo-fed train --resume {folder}"] if training.scenario.checkpoint.every else []),
            label="interrupted: ",
        )
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001, no traceback reaches a user
        display.stop()
        if training.result is not None:
            display.end(training.result)
        _complain(_said(error), _kept(folder))
        if debug:
            traceback.print_exc()
        raise typer.Exit(FAILED) from None
    display.stop()
    assert training.result is not None
    display.end(training.result)


@app.command()
def play(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that a run left.")],
    client: Annotated[str | None, typer.Option(metavar="NAME", help="One client; by default all.")] = None,
    episodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="By default as the run evaluated.")] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="Sampled actions, not the likeliest.")] = False,
    gif: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw an episode of one client.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, max=SEEDS, help="Other episodes.")] = None,
    debug: Debug = False,
) -> None:
    """Play episodes with what a run learned, and say what they scored."""
    with telling(debug):
        _ready()
        _no_screen()
        from grpo_fed.film import film, refuse_unusable
        from grpo_fed.saved import clients_of, load_policy

        names = clients_of(run) if client is None else [client]
        if gif is not None:
            if len(names) > 1:
                raise ValueError(f"--gif draws one client: say --client NAME, one of {', '.join(names)}")
            refuse_unusable(gif)
        policies = [load_policy(run, name) for name in names]
    with telling(debug, FAILED):
        from grpo_fed.tables import number, table_of

        console = _console()
        table = table_of("client", "mean", "std", "min", "max", "episodes", "steps each")
        with console.status("playing"):
            for policy in policies:
                done = policy.play(episodes, not sampled, seed)
                scores = [number(float(value)) for value in (done.score, done.scores.std(), done.scores.min())]
                cells = [
                    *scores,
                    number(float(done.scores.max())),
                    f"{len(done.scores)}",
                    f"{done.lengths.mean():,.1f}",
                ]
                table.add_row(done.client, *cells)
        console.print(table)
        if gif is not None:
            with console.status("drawing"):
                made = film(policies[0], gif, not sampled, seed)
            typer.echo(f"{gif}: {made.length:,} steps, return {number(made.score)}, {made.frames:,} pictures")


@app.command()
def check(scenario: Source, overrides: Overrides = None, seed: Seed = None, debug: Debug = False) -> None:
    """Show what a scenario comes to: clients, policies, blocks and groups. Trains nothing."""
    with telling(debug):
        _ready()
        settings = _scenario(scenario, overrides, seed)
        from grpo_fed.fleet import fleets_of
        from grpo_fed.overview import overview

        fleets = fleets_of(settings)
        console = _console()
        for part in overview(settings, fleets):
            console.print(part)
        for fleet in fleets:
            fleet.close()


@app.command()
def config(
    section: Annotated[str | None, typer.Argument(metavar="SECTION", help="One of them, such as objective.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="All, as docs/configuration.md has it.")] = False,
) -> None:
    """Show every knob with its default, its limits and its meaning."""
    with telling():
        from grpo_fed.describe import markdown
        from grpo_fed.reference import reference

        if as_markdown and section is not None:
            raise ValueError(f"--markdown shows all: leave out {section}")
        if as_markdown:
            typer.echo(markdown(), nl=False)
            return
        console = _console()
        for part in reference(section):
            console.print(part)


@app.command()
def schema() -> None:
    """Print the JSON schema of scenarios, for editors."""
    with telling():
        from grpo_fed import describe

        typer.echo(json.dumps(describe.schema(), indent=1))


@app.command(name="list")
def list_scenarios() -> None:
    """List the scenarios that ship."""
    with telling():
        from rich.text import Text

        from grpo_fed.gallery import shipped

        console = _console()
        for one in shipped():
            console.print(Text(one.name, style="bold cyan"))
            console.print(Text(one.header), width=min(console.width, 100) - 2)
            console.print()
        console.print(Text("grpo-fed check NAME shows what one comes to, grpo-fed train NAME trains it.", style="dim"))


# What went wrong -----------------------------------------------------------------------------------------------------


@contextmanager
def telling(debug: bool = False, code: int = WRONG) -> Iterator[None]:
    """What is foreseen becomes its message and an exit code, all else a short message and a file with the traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _complain("nothing was started", label="interrupted: ")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001, no traceback reaches a user
        if debug:
            traceback.print_exc()
        if _foreseen(error):
            _complain(_said(error))
            raise typer.Exit(code) from None
        handle, name = tempfile.mkstemp(prefix="grpo-fed-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            traceback.print_exc(file=file)
        _complain(_said(error), f"this should not happen; its traceback is in {name}")
        raise typer.Exit(FAILED) from None


def _foreseen(error: Exception) -> bool:
    """Whether its message is meant for users: what we raise, and what the machine refuses."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("grpo_fed.")


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return str(error) if _foreseen(error) else f"{type(error).__name__}: {error}"


def _kept(folder: Path) -> str:
    """Write the traceback into the run's folder; where what there is can be found."""
    from grpo_fed.journal import FAILURE, RESULTS

    said = []
    with suppress(OSError):
        (folder / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
        said.append(f"the traceback is in {folder / FAILURE}")
    if (folder / RESULTS).exists():
        said.append(f"what was learned before that is in {folder}/")
    return "; ".join(said)


def _complain(*lines: str, label: str = "error: ") -> None:
    """On stderr, in red where there are colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    for number, line in enumerate("\n".join(lines).splitlines()):
        console.print(Text.assemble((label if number == 0 else " " * len(label), "bold red"), line), soft_wrap=True)


# What commands have in common ----------------------------------------------------------------------------------------


def _ready() -> None:
    """Before torch and numpy are there: a thread each, as matrices are small, and modules of the user's own here."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _no_screen() -> None:
    """Pictures need none: pygame is to look for no window, and MuJoCo for none where there is no X server."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")


def _scenario(source: str, overrides: list[str] | None, seed: int | None) -> Scenario:
    """What the user named, with what the user changed."""
    from grpo_fed.gallery import find
    from grpo_fed.scenario import Scenario

    changes = [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]
    return Scenario.load(find(source), changes)


def _fresh_folder(scenario: Scenario) -> Path:
    """One that is not there yet, `runs/<scenario>-<seed>-<time>`."""
    name = f"{scenario.name}-{scenario.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)
