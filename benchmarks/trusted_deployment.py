"""A deployment with TLS and keys on this machine, whose processes a benchmark may kill.

`grpo-fed deploy server` and a `grpo-fed deploy client` for each client run as commands, as on machines of their own.
The clients reach the server through a proxy that can be cut.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from benchmarks.network import Proxy
from grpo_fed.engines.deploy import commands
from grpo_fed.engines.flower.superlink import find_free_port

CONNECTION = commands.CONNECTION
ROOT = Path(__file__).parents[1]
SUPERLINK, SUPEREXEC, SERVER_APP = "engines.flower.access", "engines.flower.superexec", "flwr-serverapp"
NODE, FORK_SERVER = "engines.resident.host", "fork_server"
"""Words in the commands of a deployment's processes."""


class TrustedDeployment:
    """A server and clients, from `with` to its end; Flower's configuration of this process is that of the folder."""

    def __init__(self, folder: Path, clients: Sequence[str]) -> None:
        """folder: gets the keys, certificates, states and logs."""
        self.folder, self.names = folder, tuple(clients)
        self.port = find_free_port()
        self.network = Proxy(self.port)
        """Between the clients and the server."""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        """By name, `server` and the clients' commands."""

    def __enter__(self) -> Self:
        commands.init(self.folder, [], self.names)
        os.environ["FLWR_HOME"] = str(self.folder / "home")
        self.network.__enter__()
        try:
            self.start_server()
            for name in self.names:
                self.start_client(name)
            self.wait_until(lambda: all(map(self.is_connected, self.names)), "the clients connect")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        self.network.__exit__()

    def start_server(self) -> None:
        """Start `deploy server`, and wait until it is ready."""
        ready = self.count_lines("server", "ready at")
        where = "--host", "127.0.0.1", "--port", str(self.port)
        self._start("server", "server", str(self.folder / "server"), *where)
        self.wait_until(lambda: self.count_lines("server", "ready at") > ready, "the server is ready")

    def start_client(self, name: str, keys: Path | None = None, log: str | None = None) -> None:
        """Start `deploy client` for a client. keys: a folder with other ones. log: another name for its output."""
        given, state = keys or self.folder / "clients" / name, self.folder / "state" / (log or name)
        address = f"127.0.0.1:{self.network.port}"
        where = "--superlink", address, "--state", str(state)
        self._start(log or name, "client", str(given), "--name", name, *where)

    def stop(self, name: str) -> None:
        """Stop `server` or a client's command, and wait for its end."""
        self.processes[name].send_signal(signal.SIGTERM)
        self.processes[name].wait(30)

    def is_connected(self, name: str) -> bool:
        """Return whether a client has said that it is connected."""
        return self.count_lines(name, f"client {name} is connected") > 0

    def count_lines(self, name: str, words: str) -> int:
        """Count the lines of a command's output that contain some words."""
        log = self.log(name)
        return log.read_text(errors="replace").count(words) if log.exists() else 0

    def log(self, name: str) -> Path:
        """Return the file with a command's output."""
        return self.folder / f"{name}.log"

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        """Wait until something is true; RuntimeError after so many seconds."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"waited {seconds:g} s in vain until {what}; the logs are in {self.folder}")
            time.sleep(0.05)

    def _start(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-u", "-m", "grpo_fed", "deploy", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def read_descendants(roots: Sequence[int]) -> Mapping[int, str]:
    """Return the commands of all processes that descend from some, and of these themselves, by process id."""
    parents, commands_of = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands_of[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()

    def descends(pid: int) -> bool:
        while pid not in roots and pid in parents:
            pid = parents[pid]
        return pid in roots

    return {pid: command for pid, command in commands_of.items() if descends(pid)}
