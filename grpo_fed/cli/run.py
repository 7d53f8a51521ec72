"""The commands that train: run, train."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, cast

import typer

from grpo_fed.cli.application import app
from grpo_fed.cli.drawing import begin_importing, draw_run
from grpo_fed.cli.errors import (
    FAILED,
    INTERRUPTED,
    message_for_user,
    patience_after,
    print_error,
    report_errors,
    save_traceback,
    stop_when_terminated,
    time_interruption,
)
from grpo_fed.cli.options import (
    RunOptions,
    load_scenario,
    prepare_process,
    read_given_keys,
    startup_status,
    with_run_options,
)
from grpo_fed.cli.output import UnbreakableStream
from grpo_fed.runs.called_as import called_as

if TYPE_CHECKING:
    from grpo_fed.engines.start import Engine
    from grpo_fed.reports.displays import Display
    from grpo_fed.runs.records import RoundRecord
    from grpo_fed.runs.results import Status
    from grpo_fed.runs.tracking import Tracker
    from grpo_fed.scenario.scenario import Scenario


EngineName = Literal["local", "flower-sim", "flower"]
"""The same as `EngineName` of `engines/start.py`, which is not imported before it is needed."""


@dataclass(frozen=True)
class Trainer:
    """How a command starts and resumes a run."""

    command: str
    """The command as a user types it, without the options that both commands share."""
    start: Callable[[Scenario, Path, bool], Engine]
    """Makes the engine of a new run in a folder; the last argument allows to remove a run that is there."""
    resume: Callable[[Path], Engine]
    """Makes the engine of a run that was stopped, from its folder."""
    federated: bool
    """Whether the clients are a federation."""
    engine: str = "local"
    """The engine's name."""
    newcomers: tuple[str, ...] = ()
    """Clients that join a run which goes on, as inline tables of TOML."""


@app.command()
@with_run_options
def run(
    options: RunOptions,
    engine: Annotated[EngineName, typer.Option("--engine", help="What runs the clients.")] = "local",
    superlink: Annotated[
        str | None,
        typer.Option("--superlink", metavar="NAME", help="The connection for --engine flower."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", metavar="N", min=0, help="Processes of the local engine; by default one for each core."
        ),
    ] = None,
) -> None:
    """Train a federation: clients learn, the server merges what they share."""

    def start(scenario: Scenario, folder: Path, replace: bool) -> Engine:
        from grpo_fed.engines.start import make_engine

        return make_engine(scenario, folder, engine, superlink, workers, replace)

    def resume(folder: Path) -> Engine:
        from grpo_fed.engines.start import resume_engine

        if options.continued is not None and engine != "local":
            raise ValueError(f"--continue is for --engine local; with {engine}, start from the run's policies instead")
        if workers is not None:
            raise ValueError("--resume uses the workers that the run was started with: leave out --workers")
        return resume_engine(folder, engine, superlink)

    command = "run" if engine == "local" else f"run --engine {engine}"
    command += "" if superlink is None else f" --superlink {superlink}"
    run_command(Trainer(command, start, resume, federated=True, engine=engine), options)


@app.command()
@with_run_options
def train(options: RunOptions) -> None:
    """Train every client of a scenario alone, without any federation."""

    def start(scenario: Scenario, folder: Path, replace: bool) -> Engine:
        from grpo_fed.engines.alone import AloneEngine

        return AloneEngine(scenario, folder, replace=replace)

    def resume(folder: Path) -> Engine:
        from grpo_fed.engines.alone import AloneEngine

        return AloneEngine.resumed(folder)

    run_command(Trainer("train", start, resume, federated=False), options)


def run_command(trainer: Trainer, options: RunOptions) -> None:
    """Start or resume a run, show it, and exit with a code if it does not finish."""
    stdout = UnbreakableStream(sys.stdout)
    with ExitStack() as stack:
        stack.enter_context(stop_when_terminated())
        since_interruption = stack.enter_context(time_interruption())
        stack.enter_context(redirect_stdout(sys.stderr if options.as_json else stdout))  # an environment may print
        with report_errors(options.debug), startup_status(not (options.as_json or options.quiet)):
            prepare_process()
            engine, folder = _engine_and_folder(trainer, options)
            stack.enter_context(engine)
            from grpo_fed.reports.displays import display_for
            from grpo_fed.reports.progress import RunHeader
            from grpo_fed.runs.tracking import Tracker
            from grpo_fed.runs.tracking.origin import RunOrigin

            scenario = engine.scenario
            is_resumed, from_run = options.resume is not None, options.tracking_from_run
            if from_run and not is_resumed:
                raise ValueError("--tracking-from-run is for a run that goes on: leave it out, or give --resume RUN")
            origin = RunOrigin(trainer.engine, tuple(options.overrides or ()), options.register)
            tracker = Tracker.open(options.track, folder, scenario, is_resumed, from_run=from_run, origin=origin)
            method = scenario.method if trainer.federated else ""
            header = RunHeader(scenario, engine.device, folder, method, tracker.place)
            display = display_for(cast("TextIO", stdout), options.as_json, options.quiet)
        if not (options.as_json or options.quiet):
            _note_unused_keys(scenario, options)
        if trouble := tracker.find_trouble():
            print_error(trouble, label="note: ")
        display.begin(header)
        _run_engine(trainer, engine, folder, display, tracker, options, since_interruption)
    stdout.flush()
    if stdout.failure is not None:
        message = f"stdout could not be written: {stdout.failure}; the run went on, and its results are in {folder}/"
        print_error(message, label="note: ")
        raise typer.Exit(FAILED)


def _engine_and_folder(trainer: Trainer, options: RunOptions) -> tuple[Engine, Path]:
    """Make the engine that the options ask for, and choose the run's folder."""
    if options.resume is not None:
        given = (options.scenario, options.overrides, options.seed, options.out, options.replace or None)
        if options.continued is not None:
            raise ValueError("--resume goes on with a run that was stopped, --continue with one that ended: use one")
        if any(value is not None for value in given):
            text = "leave out SCENARIO, --set, --seed, --out and --replace"
            raise ValueError(f"--resume continues a run as it was started: {text}")
        return trainer.resume(options.resume), options.resume
    if options.continued is not None:
        return _continue_run(trainer, options, options.continued)
    if options.scenario is None:
        command = trainer.command
        raise ValueError(f"{command} needs a SCENARIO, or --resume RUN; grpo-fed list names the scenarios that ship")
    scenario = load_scenario(options.scenario, options.overrides, options.seed)
    if options.out is not None:
        return trainer.start(scenario, options.out, options.replace), options.out
    return _start_in_new_folder(trainer, scenario)


def _continue_run(trainer: Trainer, options: RunOptions, run: Path) -> tuple[Engine, Path]:
    """Make a folder that goes on from a run's latest checkpoint, and the engine for it."""
    from grpo_fed.federation.joining import prepare_joining
    from grpo_fed.runs.continuation import prepare_continuation
    from grpo_fed.runs.folder import FolderTakenError, candidate_folders, read_scenario, remove_run

    if options.scenario is not None:
        raise ValueError(f"--continue goes on with the scenario of {run}: leave out {options.scenario}")
    if options.seed is not None:
        raise ValueError(f"--continue goes on with the seed of {run}: leave out --seed")
    overrides = options.overrides or []
    for folder in [options.out] if options.out is not None else candidate_folders(read_scenario(run)):
        try:
            if trainer.newcomers:
                prepare_joining(run, trainer.newcomers, overrides, folder, new=not options.replace)
            else:
                prepare_continuation(run, overrides, folder, new=not options.replace)
        except FolderTakenError:
            if options.out is not None:
                raise
            continue
        try:
            return trainer.resume(folder), folder
        except BaseException:
            remove_run(folder)
            folder.rmdir()
            raise
    raise AssertionError("there is always another name")


def _note_unused_keys(scenario: Scenario, options: RunOptions) -> None:
    """Say on stderr how many of the keys that the user wrote have no effect, and which command names them."""
    if options.scenario is None:  # the run is resumed or continued
        return
    count = len(read_given_keys(options.scenario, options.overrides, options.seed).unused_lines(scenario))
    if count:
        changes = [word for override in options.overrides or [] for word in ("--set", override)]
        what = "1 key that you set has" if count == 1 else f"{count} keys that you set have"
        command = shlex.join(["check", options.scenario, *changes])
        print_error(f"{what} no effect; {called_as()} {command} says why", label="note: ")


def _start_in_new_folder(trainer: Trainer, scenario: Scenario) -> tuple[Engine, Path]:
    """Make an engine for a run without a folder; another run may take a name in the same second."""
    from grpo_fed.runs.folder import FolderTakenError, candidate_folders

    for folder in candidate_folders(scenario):
        try:
            return trainer.start(scenario, folder, False), folder
        except FolderTakenError:
            continue
    raise AssertionError("there is always another name")


def _run_engine(
    trainer: Trainer,
    engine: Engine,
    folder: Path,
    display: Display,
    tracker: Tracker,
    options: RunOptions,
    since_interruption: Callable[[], float],
) -> None:
    """Run the engine to its end; if something stops it, say where the results so far are.

    since_interruption: returns the seconds since Ctrl-C.
    """
    from grpo_fed.runs.continuation import read_earlier_lines
    from grpo_fed.runs.provenance import Provenance, write_provenance
    from grpo_fed.runs.records import record_to_line

    provenance = Provenance.of_process()

    def watch(record: RoundRecord) -> None:
        write_provenance(folder, provenance)
        display.round(record)
        tracker.round(record_to_line(record))

    for line in read_earlier_lines(folder) if options.continued is not None else ():
        tracker.round(line)
    begin_importing(options)
    try:
        engine.run(watch)
    except KeyboardInterrupt:
        _show_outcome(engine, display)
        how_to_resume = f"to continue: {called_as()} {trainer.command} --resume {shlex.quote(str(folder))}"
        if options.track and tracker.store is not None:  # the address in the folder is not trusted
            how_to_resume += f" --track {tracker.store.uri}"
        print_error(
            f"the latest policies and results.json are in {folder}/",
            *([how_to_resume] if engine.scenario.checkpoint.every else []),
            label="interrupted: ",
        )
        _finish_tracking(tracker, engine, "interrupted", display, patience=patience_after(since_interruption()))
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001, no traceback reaches a user
        _show_outcome(engine, display)
        print_error(message_for_user(error), save_traceback(folder))
        if options.debug:
            traceback.print_exc()
        _finish_tracking(tracker, engine, "failed", display)
        raise typer.Exit(FAILED) from None
    assert engine.result is not None
    _show_outcome(engine, display)
    completed = draw_run(folder, options, display, with_page=tracker.store is not None)
    completed = _finish_tracking(tracker, engine, engine.result.status, display, wait=completed) and completed
    if tracker.store is not None and tracker.trouble is None:
        display.say(f"MLflow: {tracker.link or tracker.place}")
    if not completed:
        raise typer.Exit(INTERRUPTED)


def _show_outcome(engine: Engine, display: Display) -> None:
    display.stop()
    if engine.result is not None:
        display.end(engine.result)
        for note in engine.result.notes:
            print_error(note, label="note: ")


def _finish_tracking(
    tracker: Tracker,
    engine: Engine,
    status: Status,
    display: Display,
    wait: bool = True,
    patience: float | None = None,
) -> bool:
    """Send the remaining records to MLflow and wait a while; return False if Ctrl-C stopped the waiting.

    wait: False to leave the rest to the process that sends it. patience: seconds to wait; None for the tracker's own.
    """
    from grpo_fed.runs.tracking.tracker import PATIENCE

    document = None if engine.result is None else engine.result.to_json()
    patience = PATIENCE if patience is None else patience
    try:
        with display.busy("sending the rest to MLflow; Ctrl-C: do not wait"):
            tracker.close(document, status, patience if wait else 0.0)
    except KeyboardInterrupt:
        wait = False
    if not wait and tracker.store is not None:
        message = "all results are saved, and the rest is still being sent to MLflow; if it does not arrive,"
        folder = tracker.spool.folder.parent
        command = f"{called_as()} replay {shlex.quote(str(folder))}"
        print_error(f"{message} {command} sends it", label="interrupted: ")
        return False
    if tracker.trouble is not None:
        print_error(tracker.trouble, label="note: ")
    return wait
