"""What a command says when something goes wrong: a message and an exit code, never a traceback."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

FAILED, WRONG, INTERRUPTED = 1, 2, 130


@contextmanager
def report_errors(debug: bool = False, code: int = WRONG) -> Iterator[None]:
    """What is foreseen becomes its message and an exit code, all else a short message and a file with the traceback."""
    try:
        yield
    except KeyboardInterrupt:
        complain("nothing was started", label="interrupted: ")
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001, no traceback reaches a user
        if debug:
            traceback.print_exc()
        if _foreseen(error):
            complain(message_for_user(error))
            raise typer.Exit(code) from None
        if isinstance(error, MemoryError):
            complain("this machine has not the memory for it", *([str(error)] if str(error) else []))
            raise typer.Exit(FAILED) from None
        handle, name = tempfile.mkstemp(prefix="grpo-fed-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            traceback.print_exc(file=file)
        complain(message_for_user(error), f"this should not happen; its traceback is in {name}")
        raise typer.Exit(FAILED) from None


def _foreseen(error: Exception) -> bool:
    """Whether its message is meant for users: what we raise, and what the machine refuses."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("grpo_fed.")


def message_for_user(error: Exception) -> str:
    """An error in words for a user."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return str(error) if _foreseen(error) else f"{type(error).__name__}: {error}"


def save_traceback(folder: Path) -> str:
    """Write the traceback into the run's folder; where what there is can be found."""
    from grpo_fed.runs.folder import FAILURE
    from grpo_fed.runs.results import RESULTS

    lines = []
    with suppress(OSError):
        (folder / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
        lines.append(f"the traceback is in {folder / FAILURE}")
    if (folder / RESULTS).exists():
        lines.append(f"what was learned before that is in {folder}/")
    return "; ".join(lines)


def complain(*lines: str, label: str = "error: ") -> None:
    """On stderr, in red where there are colours."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    for number, line in enumerate("\n".join(lines).splitlines()):
        console.print(Text.assemble((label if number == 0 else " " * len(label), "bold red"), line), soft_wrap=True)
