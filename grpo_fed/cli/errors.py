"""Errors of commands: a message and an exit code, never a traceback."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import typer

FAILED, WRONG, INTERRUPTED = 1, 2, 130
"""Exit codes: a run failed, the scenario or the call is wrong, Ctrl-C."""
INTERRUPTED_PATIENCE, END_SECONDS = 2.0, 3.0
"""Seconds that the end of an interrupted run waits for MLflow, and since Ctrl-C at most."""


@contextmanager
def stop_when_terminated() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, with its results saved; so a service or a job queue stops it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def time_interruption() -> Iterator[Callable[[], float]]:
    """Give a function that returns the seconds since Ctrl-C or SIGTERM; 0 if there was none.

    What ends a run takes its time before the exception arrives at whoever has to know how much is left.
    """
    signalled: list[float] = []

    def seconds() -> float:
        return time.monotonic() - signalled[0] if signalled else 0.0

    if threading.current_thread() is not threading.main_thread():
        yield seconds
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        signalled.append(time.monotonic())
        handler = before[signal.Signals(number)]
        assert callable(handler), "no other is replaced"
        handler(number, frame)

    replaced = {number: handler for number, handler in before.items() if callable(handler)}
    for number in replaced:
        signal.signal(number, note)
    try:
        yield seconds
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def patience_after(seconds: float) -> float:
    """Return the seconds to wait for MLflow, so many seconds after Ctrl-C."""
    return max(0.0, min(INTERRUPTED_PATIENCE, END_SECONDS - seconds))


@contextmanager
def report_errors(debug: bool = False, code: int = WRONG) -> Iterator[None]:
    """Turn an error into a message on stderr and an exit code.

    An unexpected error also leaves its traceback in a temporary file. debug: print the traceback too. code: the exit
    code of an expected error.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_error("nothing was started", label="interrupted: ")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001, no traceback reaches a user
        if debug:
            traceback.print_exc()
        if _is_expected(error):
            print_error(message_for_user(error))
            raise typer.Exit(code) from None
        if isinstance(error, MemoryError):
            print_error("this machine does not have enough memory", *([str(error)] if str(error) else []))
            raise typer.Exit(FAILED) from None
        handle, name = tempfile.mkstemp(prefix="grpo-fed-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            traceback.print_exc(file=file)
        print_error(message_for_user(error), f"this is an unexpected error; its traceback is in {name}")
        raise typer.Exit(FAILED) from None


def _is_expected(error: Exception) -> bool:
    """Decide whether an error's message is meant for users: our own errors and those of the operating system are."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("grpo_fed.")


def message_for_user(error: Exception) -> str:
    """Write an error as a message for users."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return str(error) if _is_expected(error) else f"{type(error).__name__}: {error}"


def save_traceback(folder: Path) -> str:
    """Write the current traceback to the run's folder; return a line that says where it is, and the results."""
    from grpo_fed.runs.files import write_atomic
    from grpo_fed.runs.folder import FAILURE
    from grpo_fed.runs.results import RESULTS

    lines = []
    with suppress(OSError):
        write_atomic(folder / FAILURE, traceback.format_exc())
        lines.append(f"the traceback is in {folder / FAILURE}")
    if (folder / RESULTS).exists():
        lines.append(f"the policies and results so far are in {folder}/")
    return "; ".join(lines)


def print_error(*lines: str, label: str = "error: ") -> None:
    """Print lines on stderr after a label, which is red where there are colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    for index, line in enumerate("\n".join(lines).splitlines()):
        console.print(Text.assemble((label if index == 0 else " " * len(label), "bold red"), line), soft_wrap=True)
