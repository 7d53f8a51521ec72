"""A process that starts others and ends them with its owner, however the owner ends.

It runs as a script, on the standard library alone. Its input closes when its owner closes it or dies, even if killed
with -9; then it stops the processes that it started, and those that they started: on Linux their orphans become its own
children. A line of input is a request in JSON; a line of output reports a process that was started or has ended.

A process may also be forked by a launcher (`launcher.py`), which is started when a request says so. Then it is an
orphan from its beginning, and so a child of this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 4.0
"""Seconds between asking a process to stop and killing it."""
APP_GRACE = 1.0
"""Of these, those that a server's app has before all others are asked to stop."""
SERVER_APP = b"flwr-serverapp"
"""What the processes of server apps are called."""

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Serve requests until the input closes, then stop all processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which child processes would inherit
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    names: dict[int, str] = {}
    launcher = _Launcher()
    rest = b""
    while True:
        sources: list[Any] = [0, *launcher.sockets]
        ready, _, _ = select.select(sources, [], [], 0.1)
        if 0 in ready:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _serve(json.loads(line), names, launcher)
        if ready != [0]:
            launcher.receive(names, ready)
        _reap(names, launcher)
    _stop_all(names)


class _Launcher:
    """The process that forks others, once there is one."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self._pending: list[str] = []
        """Names of processes that it was asked for."""
        self._ended: dict[int, int] = {}
        """By id, the exit codes of orphans that ended before it had reported them."""

    def start(self, request: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, Path(request["log"]).open("ab") as log:
            child = subprocess.Popen(
                request["launcher"],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=request["folder"],
                start_new_session=True,
            )
        child.returncode = 0  # as below
        self.sockets = [ours]

    def send(self, request: dict[str, Any]) -> None:
        if not self.sockets:
            _report(name=request["name"], exit_code=1)
            return
        self._pending.append(request["name"])
        with suppress(OSError):  # that it has died is seen when it is read from
            self.sockets[0].send(json.dumps(request).encode())

    def receive(self, names: dict[int, str], ready: list[Any]) -> None:
        """Note the processes that it has forked; if it has died, those that it has not forked have ended."""
        for link in self.sockets if self.sockets and self.sockets[0] in ready else []:
            answer = b""
            with suppress(OSError):  # it has died with a request that it had not read
                answer = link.recv(65536)
            if not answer:
                self.sockets = []
                for name in self._pending:
                    _report(name=name, exit_code=1)
                self._pending = []
                return
            forked = json.loads(answer)
            name, pid = forked["name"], forked["pid"]
            self._pending.remove(name)
            _report(name=name, pid=pid)
            if pid in self._ended:
                _report(name=name, exit_code=self._ended.pop(pid))
            else:
                names[pid] = name

    def note_end(self, pid: int, exit_code: int) -> None:
        if self._pending:
            self._ended[pid] = exit_code


def _serve(request: dict[str, Any], names: dict[int, str], launcher: _Launcher) -> None:
    """Start a command under a name, or send a signal to the process of that name, or ask the launcher."""
    if "launcher" in request:
        launcher.start(request)
        return
    if "module" in request:
        launcher.send(request)
        return
    name = request["name"]
    if "signal" in request:
        for pid in [pid for pid, process in names.items() if process == name]:
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
        _report(name=name, error=str(error))
        return
    names[child.pid] = name
    child.returncode = 0  # so that Popen does not wait for it: `_reap` waits for all children and orphans
    _report(name=name, pid=child.pid)


def _reap(names: dict[int, str], launcher: _Launcher | None = None) -> bool:
    """Reap the processes that have ended, and report them; return whether any is left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if pid in names:
            _report(name=names.pop(pid), exit_code=os.waitstatus_to_exitcode(status))
        elif launcher is not None:
            launcher.note_end(pid, os.waitstatus_to_exitcode(status))


def _stop_all(names: dict[int, str]) -> None:
    """Ask all processes to stop, and kill those that still run after a time of grace.

    Server apps come first. They write results, and tell the SuperLink of their end: without one, they try again for
    seconds. On a busy machine they would also share the processor with all that the others do when they end.
    """
    until = time.monotonic() + GRACE
    for pid in (apps := _server_apps()):
        _send(pid, signal.SIGTERM)
    while apps and _reap(names) and time.monotonic() < until - GRACE + APP_GRACE:
        time.sleep(0.02)
        apps = [pid for pid in apps if _is_server_app(pid)]
    for pid in _descendants():
        if pid not in apps:  # a second signal could interrupt what the first one began
            _send(pid, signal.SIGTERM)
    while _reap(names):
        if time.monotonic() > until:
            for pid in _descendants():
                _send(pid, signal.SIGKILL)
        if time.monotonic() > until + GRACE:
            return
        time.sleep(0.05)


def _descendants() -> list[int]:
    """Return the ids of all processes that descend from this one."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    descendants, todo = [], [os.getpid()]
    while todo:
        todo += (new := children.get(todo.pop(), []))
        descendants += new
    return descendants


def _server_apps() -> list[int]:
    """Return the ids of the server apps that descend from this process; on Linux alone."""
    return [pid for pid in _descendants() if _is_server_app(pid)]


def _is_server_app(pid: int) -> bool:
    try:
        return SERVER_APP in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # it has ended meanwhile


def _parents() -> list[tuple[int, int]]:
    """Return the id of every process with its parent's."""
    if sys.platform != "linux":
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        return [(int(pid), int(parent)) for pid, parent in map(str.split, table.splitlines())]
    pairs = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it has ended meanwhile
            pairs.append((int(entry.name), int(stat.rpartition(")")[2].split()[1])))
    return pairs


def _send(pid: int, number: int) -> None:
    with suppress(OSError):  # it has ended meanwhile
        os.kill(pid, number)


def _report(**report: object) -> None:
    """Write a line to the owner, if it is still there."""
    with suppress(OSError):
        os.write(1, json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main()
