"""Runs something in a process beside this one: a fork, which has imported all that this process has."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress


def begin_beside(work: Callable[[], str]) -> Callable[[], str]:
    """Begin work that returns a text, and return a function that waits for the text.

    The work is done in a fork where that is safe and of use: on Linux, with a second core, and while this process has a
    single thread. Elsewhere it is done when it is waited for. What it raises is raised there, in a fork as a
    RuntimeError.
    """
    if sys.platform != "linux" or (os.cpu_count() or 1) < 2 or threading.active_count() > 1:
        return work
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _answer(work, writing)
    os.close(writing)

    def wait() -> str:
        try:
            with os.fdopen(reading, encoding="utf-8") as file:
                answer = file.read()
        finally:
            os.waitpid(pid, 0)
        if not answer:
            raise RuntimeError("the process that did it was killed")
        text, error = json.loads(answer)
        if error is not None:
            raise RuntimeError(error)
        return str(text)

    return wait


def _answer(work: Callable[[], str], writing: int) -> None:
    """Do the work and send its text or its error: all that the fork does."""
    try:
        try:
            answer: tuple[str, str | None] = (work(), None)
        except Exception as error:  # noqa: BLE001, the process that waits raises it
            answer = ("", f"{type(error).__name__}: {error}")
        with suppress(OSError), os.fdopen(writing, "w", encoding="utf-8") as file:
            file.write(json.dumps(answer))
    except BaseException:  # noqa: BLE001, a fork must never return into what it was forked from
        pass
    finally:
        os._exit(0)
