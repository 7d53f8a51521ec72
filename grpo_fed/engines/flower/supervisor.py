"""A process that starts others and leaves none behind, whatever becomes of the one that asked for them.

It runs as a script of its own, on the standard library alone. Its input closes when whoever asked for it is done or
dead, killed with -9 even; then it stops what it started, and what those started: on Linux their orphans become its own
children. A line in is a JSON request, a line out says what was started and what ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds between asking a process to stop and killing it."""

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Serve requests until there can be no more, then stop everything."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which those that it starts would inherit
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    names: dict[int, str] = {}
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.1)
        if ready:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _serve(json.loads(line), names)
        _reap(names)
    _stop_all(names)


def _serve(request: dict[str, Any], names: dict[int, str]) -> None:
    """`start` a command under a name, or send a `signal` to what goes by it."""
    name = request["name"]
    if "signal" in request:
        for pid in [pid for pid, other in names.items() if other == name]:
            _send(pid, request["signal"])
        return
    try:
        with Path(request["log"]).open("ab") if request["log"] else os.fdopen(os.dup(2), "ab") as log:
            child = subprocess.Popen(
                request["start"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=request["folder"],
                start_new_session=True,
            )
    except OSError as error:
        _tell(name=name, error=str(error))
        return
    names[child.pid] = name
    child.returncode = 0  # it is waited for below, with everyone's orphans
    _tell(name=name, pid=child.pid)


def _reap(names: dict[int, str]) -> bool:
    """Take notice of those that have ended; whether any is left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if pid in names:
            _tell(name=names.pop(pid), ended=os.waitstatus_to_exitcode(status))


def _stop_all(names: dict[int, str]) -> None:
    """Ask all that are there, give them time, kill who is left."""
    for pid in _descendants():
        _send(pid, signal.SIGTERM)
    patient = time.monotonic() + GRACE
    while _reap(names):
        if time.monotonic() > patient:
            for pid in _descendants():
                _send(pid, signal.SIGKILL)
        if time.monotonic() > patient + GRACE:
            return
        time.sleep(0.05)


def _descendants() -> list[int]:
    """All that come from here."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, todo = [], [os.getpid()]
    while todo:
        todo += (new := children.get(todo.pop(), []))
        found += new
    return found


def _parents() -> list[tuple[int, int]]:
    """Every process and its parent."""
    if sys.platform != "linux":
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        return [(int(pid), int(parent)) for pid, parent in map(str.split, table.splitlines())]
    pairs = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # gone since
            pairs.append((int(entry.name), int(stat.rpartition(")")[2].split()[1])))
    return pairs


def _send(pid: int, number: int) -> None:
    with suppress(OSError):  # gone since
        os.kill(pid, number)


def _tell(**news: object) -> None:
    """To whoever asked, if it is still there."""
    with suppress(OSError):
        os.write(1, json.dumps(news).encode() + b"\n")


if __name__ == "__main__":
    main()
