"""Warnings of libraries on the terminal: each is shown once, however many processes of a run meet it.

A run's processes make the same environments, and each process would show their warnings by itself. The first process
that meets one leaves a file of its digest in a folder that all of them know from their environment.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TextIO

FOLDER = "GRPO_FED_WARNINGS"
"""The environment variable that names the folder."""
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""What colours a text on a terminal."""


def show_warnings_once() -> None:
    """Show warnings from now on as a line each, without escape codes, and every one once in all processes."""
    if FOLDER not in os.environ:
        folder = tempfile.mkdtemp(prefix="grpo-fed-warnings-")
        os.environ[FOLDER] = folder
        atexit.register(_remove, folder, os.getpid())
    warnings.showwarning = _show


def join_process() -> None:
    """Do the same in a process that was started by one which shows warnings once; nothing in any other."""
    if FOLDER in os.environ:
        warnings.showwarning = _show


def warning_line(message: Warning | str, category: type[Warning], filename: str, lineno: int) -> str:
    """Write a warning in one line, with the file of the library that it comes from."""
    text = " ".join(ESCAPES.sub("", str(message)).split()).removeprefix("WARN: ")
    place = re.split(r"[/\\](?:site|dist)-packages[/\\]", filename)[-1]
    return f"warning: {text} ({category.__name__}, {place}:{lineno})"


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning unless another process has; takes what `warnings.showwarning` takes."""
    text = warning_line(message, category, filename, lineno)
    if _is_first(text):
        print(text, file=file or sys.stderr, flush=True)


def _is_first(text: str) -> bool:
    """Leave a mark of a warning; return whether nobody had."""
    mark = Path(os.environ[FOLDER]) / hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder is gone: a warning twice is better than none
        return True
    return True


def _remove(folder: str, owner: int) -> None:
    """Remove the folder when the process that made it ends, not when a fork of it does."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
