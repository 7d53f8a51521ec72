"""What a client's exception tells the server: its type and its place in grpo_fed, and no letter of its text.

The text may hold whatever an environment knows. It stays in a file of the client's own states, which the server is told
the name of. With `privacy.errors = "text"` it is sent.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from pathlib import Path
from typing import final

from grpo_fed.runs.files import make_private_folder

FOLDER = "errors"
"""The folder with a file for each client, among the clients' states."""
MOST_BYTES = 10_000_000
"""The most bytes of a file; it begins anew then."""
PACKAGE = Path(__file__).parents[2]
LONGEST_NAME = 60


@final
class WithheldError(Exception):
    """Stands for a client's exception, its cause; the text says nothing but type and place, and where the rest is."""


def withhold(error: Exception, client: str, state: Path) -> WithheldError:
    """Write an exception to the client's own file, and make what the server is told instead.

    state: the folder with the clients' states.
    """
    name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', client) or 'client'}.log"
    where = f"its text is in {FOLDER}/{name} among the states on the client's machine"
    try:
        _append(state / FOLDER / name, error)
    except OSError as failure:
        where = f"its text is in the log of the client's node alone, since no file could be written ({failure.errno})"
    return WithheldError(f"{describe_place(error)}; {where}")


def describe_place(error: BaseException) -> str:
    """Name an exception's type, and the line of grpo_fed that it came from."""
    name = type(error).__name__
    known = name[:LONGEST_NAME] if name.isidentifier() else "an exception"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(PACKAGE):
            return f"{known} at {PACKAGE.name}/{file.relative_to(PACKAGE).as_posix()}:{frame.lineno}"
    return known


def _append(path: Path, error: Exception) -> None:
    """Add an exception to a file that only its owner may read."""
    for folder in (path.parent.parent, path.parent):
        make_private_folder(folder)
    begin = os.O_TRUNC if path.exists() and path.stat().st_size > MOST_BYTES else 0
    text = "".join(traceback.format_exception(error))
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | begin, 0o600), "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n")
