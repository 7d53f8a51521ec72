"""Commands that train."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, cast

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.errors import FAILED, INTERRUPTED, complain, message_for_user, report_errors, save_traceback
from grpo_fed.cli.options import (
    SOURCE,
    Debug,
    Figures,
    Films,
    Json,
    Out,
    Overrides,
    Quiet,
    Resume,
    Seed,
    Track,
    fresh_folder,
    getting_ready,
    prepare_process,
    scenario_from,
    use_no_display,
)
from grpo_fed.cli.output import UnbreakableStream

if TYPE_CHECKING:
    from grpo_fed.engines.start import Engine
    from grpo_fed.reports.progress import Display, RunHeader
    from grpo_fed.runs.records import RoundRecord
    from grpo_fed.runs.results import Status
    from grpo_fed.runs.tracking import Tracker
    from grpo_fed.scenario.scenario import Scenario


EngineName = Literal["local", "flower-sim", "flower"]
"""As `engines.choice` has them; it is not imported before it is needed."""


@dataclass(frozen=True)
class Options:
    """What both commands take."""

    scenario: str | None
    overrides: list[str] | None
    seed: int | None
    out: Path | None
    resume: Path | None
    track: str | None
    figures: bool
    films: bool
    as_json: bool
    quiet: bool
    debug: bool


@app.command()
def run(
    scenario: Annotated[str | None, typer.Argument(metavar="SCENARIO", help=SOURCE)] = None,
    engine: Annotated[EngineName, typer.Option("--engine", help="What carries the messages.")] = "local",
    superlink: Annotated[
        str | None, typer.Option("--superlink", metavar="NAME", help="With --engine flower: a deployment's connection.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", metavar="N", min=0, help="Of the local engine: processes; by default one for a core."
        ),
    ] = None,
    overrides: Overrides = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = None,
    track: Track = None,
    figures: Figures = True,
    films: Films = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a federation: clients learn, the server merges what they share."""

    def federation(settings: Scenario, folder: Path) -> Engine:
        from grpo_fed.engines.start import make_engine

        return make_engine(settings, folder, engine, superlink, workers)

    def resumed(folder: Path) -> Engine:
        from grpo_fed.engines.start import resume_engine

        if workers is not None:
            raise ValueError("--resume goes on with the workers that the run had: leave out --workers")
        return resume_engine(folder, engine, superlink)

    options = Options(scenario, overrides, seed, out, resume, track, figures, films, as_json, quiet, debug)
    way = "" if engine == "local" else f" --engine {engine}"
    way += "" if superlink is None else f" --superlink {superlink}"
    _run_command(f"run{way}", options, federation, resumed)


@app.command()
def train(
    scenario: Annotated[str | None, typer.Argument(metavar="SCENARIO", help=SOURCE)] = None,
    overrides: Overrides = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = None,
    track: Track = None,
    figures: Figures = True,
    films: Films = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train every client of a scenario alone, without any federation."""

    def training(settings: Scenario, folder: Path) -> Engine:
        from grpo_fed.engines.alone import AloneEngine

        return AloneEngine(settings, folder)

    def resumed(folder: Path) -> Engine:
        from grpo_fed.engines.alone import AloneEngine

        return AloneEngine.resumed(folder)

    options = Options(scenario, overrides, seed, out, resume, track, figures, films, as_json, quiet, debug)
    _run_command("train", options, training, resumed)


def _run_command(
    name: str, options: Options, begin: Callable[[Scenario, Path], Engine], go_on: Callable[[Path], Engine]
) -> None:
    """What both commands do with their options: a new run, or one that was stopped."""
    stdout = UnbreakableStream(sys.stdout)
    with redirect_stdout(sys.stderr if options.as_json else stdout):  # an environment may print
        with report_errors(options.debug), getting_ready(not (options.as_json or options.quiet)):
            prepare_process()
            run, folder = _engine_and_folder(name, options, begin, go_on)
            from grpo_fed.reports.progress import RunHeader, display_for
            from grpo_fed.runs.tracking import Tracker

            tracker = Tracker.open(options.track, folder, run.scenario, options.resume is not None)
            method = run.scenario.method if name != "train" else ""
            opening = RunHeader(run.scenario, run.device, folder, method, tracker.place)
            display = display_for(cast("TextIO", stdout), options.as_json, options.quiet)
        with run:
            _train_and_report(name, run, opening, display, tracker, options)
    stdout.flush()
    if stdout.lost is not None:
        complain(f"stdout took no more: {stdout.lost}; the run went on, and all is in {folder}/", label="note: ")
        raise typer.Exit(FAILED)


def _engine_and_folder(
    name: str, options: Options, begin: Callable[[Scenario, Path], Engine], go_on: Callable[[Path], Engine]
) -> tuple[Engine, Path]:
    """What the options ask for, and its folder."""
    given = (options.scenario, options.overrides, options.seed, options.out)
    if options.resume is not None:
        if any(one is not None for one in given):
            text = "it takes no SCENARIO, --set, --seed or --out"
            raise ValueError(f"--resume goes on with a run as it was begun: {text}")
        return go_on(options.resume), options.resume
    if options.scenario is None:
        raise ValueError(f"{name} needs a SCENARIO, or --resume RUN; grpo-fed list names those that ship")
    settings = scenario_from(options.scenario, options.overrides, options.seed)
    folder = options.out or fresh_folder(settings)
    return begin(settings, folder), folder


def _train_and_report(
    name: str, run: Engine, opening: RunHeader, display: Display, tracker: Tracker, options: Options
) -> None:
    """Run; whatever stops it, say where what was learned is."""
    from grpo_fed.runs.records import record_to_line

    folder = opening.out

    def watch(note: RoundRecord) -> None:
        display.round(note)
        tracker.round(record_to_line(note))

    display.begin(opening)
    try:
        run.run(watch)
    except KeyboardInterrupt:
        display.stop()
        if run.result is not None:
            display.end(run.result)
        complain(
            f"the policies as they are and results.json are in {folder}/",
            *([f"to go on: grpo-fed {name} --resume {folder}"] if run.scenario.checkpoint.every else []),
            label="interrupted: ",
        )
        _end(tracker, run, "interrupted", display)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001, no traceback reaches a user
        display.stop()
        if run.result is not None:
            display.end(run.result)
        complain(message_for_user(error), save_traceback(folder))
        if options.debug:
            traceback.print_exc()
        _end(tracker, run, "failed", display)
        raise typer.Exit(FAILED) from None
    display.stop()
    assert run.result is not None
    display.end(run.result)
    hurried = not _draw(folder, options, display)
    hurried |= not _end(tracker, run, "finished", display, wait=not hurried)
    if tracker.store is not None and tracker.trouble is None:
        display.say(f"MLflow: {tracker.link or tracker.place}")
    if hurried:
        raise typer.Exit(INTERRUPTED)


def _draw(folder: Path, options: Options, display: Display) -> bool:
    """Figures, a summary and films of a run that has ended well; it stays so if there are none. False after Ctrl-C."""
    if not options.figures:
        return True
    try:
        with display.busy("drawing figures"):
            _figures(folder, display)
        if options.films:
            with display.busy("filming"):
                _film(folder, display)
    except KeyboardInterrupt:
        complain(f"the run has finished; grpo-fed report {folder} draws its figures and films", label="interrupted: ")
        return False
    return True


def _figures(folder: Path, display: Display) -> None:
    try:
        from grpo_fed.reports.figures import draw_figures
        from grpo_fed.reports.summary import write_summary

        figures = draw_figures(folder)
        write_summary(folder)
    except Exception as error:  # noqa: BLE001, what was learned is saved
        complain(f"the figures were not drawn: {message_for_user(error)}", label="note: ")
        return
    if figures:
        display.say(f"figures: {figures[0].parent}/; grpo-fed report {folder} makes a page of all")


def _film(folder: Path, display: Display) -> None:
    """Short ones; what cannot be drawn is left to `grpo-fed report` to tell."""
    try:
        use_no_display()
        from grpo_fed.reports.episodes import film_episodes
        from grpo_fed.reports.film import BRIEF

        filmed = film_episodes(folder, look=BRIEF)
    except Exception as error:  # noqa: BLE001, an environment may fail in any way, and what was learned is saved
        complain(f"no films were made: {message_for_user(error)}", label="note: ")
        return
    if filmed.paths:
        display.say(f"films: {filmed.paths[0].parent}/, the worst and the best client before and after")


def _end(tracker: Tracker, run: Engine, status: Status, display: Display, wait: bool = True) -> bool:
    """Send what is still to be sent, and wait a while for it; False if Ctrl-C cut that short."""
    from grpo_fed.runs.tracking.tracker import PATIENCE

    document = None if run.result is None else run.result.to_json()
    try:
        with display.busy("MLflow is taking the rest; Ctrl-C: do not wait"):
            tracker.close(document, status, PATIENCE if wait else 0.0)
    except KeyboardInterrupt:
        wait = False
    if not wait and tracker.store is not None:
        text = "all is saved; what MLflow has not taken yet goes on being sent, and else grpo-fed replay"
        complain(f"{text} {tracker.spool.folder.parent} sends it", label="interrupted: ")
        return False
    if tracker.trouble is not None:
        complain(tracker.trouble, label="note: ")
    return wait
