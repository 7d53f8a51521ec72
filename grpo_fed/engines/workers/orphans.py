"""Ends what environments have started: processes that outlive the worker in which they were started.

Linux alone tells a process's children; elsewhere there are no workers. This module imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 2.0
"""Seconds for which killed processes are waited for; one that waits for a device may take longer."""


def adopt_orphans() -> None:
    """Make this process the parent of all its descendants whose own parents end, whatever session they are in."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(kept: Collection[int] = ()) -> None:
    """Kill all descendants of this process, and wait for its children among them.

    kept: children that stay, with what they have started.
    """
    until = time.monotonic() + PATIENCE
    while found := list(_list_descendants(os.getpid(), kept)):
        for pid in found:
            with suppress(OSError):  # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)
        for pid in _read_children(os.getpid()):
            if pid not in kept:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > until:
            return
        time.sleep(0.002)


def _list_descendants(parent: int, kept: Collection[int]) -> Iterator[int]:
    for pid in _read_children(parent):
        if pid not in kept:
            yield from _list_descendants(pid, ())
            yield pid


def _read_children(parent: int) -> list[int]:
    """Read the ids of a process's children; none if it has ended."""
    children: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{parent}/task").iterdir():
            children += map(int, (thread / "children").read_text(encoding="ascii").split())
    return children
