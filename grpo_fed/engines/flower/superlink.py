"""A SuperLink of our own and its nodes, as processes, and restarting those that end.

Flower's shared local SuperLink runs every app from the folder in which it was first started. So we start one with its
own `FLWR_HOME`, port and folder. Nothing here looks for updates, reports usage or installs anything.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from grpo_fed.engines.flower.connections import SuperLinkAddress
from grpo_fed.engines.flower.processes import POLL, SupervisedProcesses
from grpo_fed.engines.workers.fork_server import is_possible

LOOPBACK = "127.0.0.1"
STATE = "GRPO_FED_STATE"
"""The environment variable with the folder in which clients keep their states."""
KEYS = "GRPO_FED_KEYS"
"""The environment variable with the file that says for which client each registered key was made."""

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # it would install torch again for every run
    "RAY_USAGE_STATS_ENABLED": "0",
}
CLOSED = {
    "FORWARDED_ALLOW_IPS": LOOPBACK,  # "*", usual in containers, lets everyone pose as this machine by a header
    "FLWR_INTERNAL_GRPC_CONTROL_API": "0",  # these two open further ports, without the gate of access.py
    "FLWR_INTERNAL_GRPC_FLEET_API": "0",
    "FLWR_OIDC_ENABLED": "0",
    "FLWR_TRACING_ENABLED": "0",
}
"""What the environment must not change about who is let in."""
REMOVED = ("SSLKEYLOGFILE", "WEB_CONCURRENCY", "FLWR_DATABASE")
"""Variables that Flower's processes do not get: the first writes the keys of connections to a file."""

POLL_INTERVAL = "0.25"
"""Seconds between two looks for an app to start: at 0.05 an idle node takes an eighth of a core, at 1 rounds drag."""

SUPERLINK, SUPEREXEC = "superlink", "superexec"
"""Names of processes: the one that nodes connect to, and the one that starts apps for it."""
PYTHON = [sys.executable, "-P", "-m"]
"""Begins the commands of our own programs."""
PROGRAM = [*PYTHON, "grpo_fed.engines.flower.access"]
"""Starts a SuperLink; `flower-superlink` would start Flower's own."""
NEEDS_KEYS = "--enable-supernode-auth"
"""Flower's option for nodes with registered keys alone."""
OPEN_TO_ALL = "--open-to-all"
"""The one option that `PROGRAM` has beside Flower's."""
APP_STARTER = [*PYTHON, "grpo_fed.engines.flower.superexec"]
"""Starts what starts apps; `flower-superexec` would start Flower's own."""
START_DEADLINE = 180.0
"""Seconds that a SuperLink may take to listen after its start."""
STABLE_AFTER, LONGEST_PAUSE = 60.0, 10.0
"""Seconds after which a restarted process counts as stable; the longest pause before it is restarted again."""


@dataclass(frozen=True)
class Identity:
    """The certificates of a SuperLink: with them connections are encrypted, and nodes need keys."""

    authority: Path
    """The certificate that signed the SuperLink's."""
    certificate: Path
    key: Path


def make_flower_environment(home: Path | None = None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of Flower's processes: this process's, with Flower's commands, and offline.

    Apps find the user's modules in the current folder, too. home: Flower's configuration, by default the user's.
    more: further variables.
    """
    path = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    modules = [os.environ.get("PYTHONPATH", ""), str(Path.cwd())]
    no_proxy = [os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), f"{LOOPBACK},localhost"]
    return {
        **{name: value for name, value in os.environ.items() if name not in REMOVED},
        **OFFLINE,
        **CLOSED,
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_INTERVAL,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join(filter(None, path)),
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "NO_PROXY": ",".join(filter(None, no_proxy)),
        **({} if home is None else {"FLWR_HOME": str(home)}),
        **(more or {}),
    }


def find_free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def read_registered_keys() -> dict[int, str] | None:
    """Read by node id for which client each key was made; None if this server does not register keys."""
    path = os.environ.get(KEYS)
    if path is None:
        return None
    registered = json.loads(Path(path).read_text(encoding="utf-8"))
    return {int(entry["node"]): client for client, entry in registered.items()}


def find_state_folder(given: Path | None) -> Path:
    """Return the folder for the clients' states: the given one, that of the environment, or the user's own."""
    user = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return (given or Path(os.environ.get(STATE) or Path(user) / "grpo_fed")).absolute()


@final
class SuperLink:
    """A SuperLink and the process that starts apps for it."""

    def __init__(
        self,
        processes: SupervisedProcesses,
        folder: Path,
        port: int,
        *,
        host: str = LOOPBACK,
        identity: Identity | None = None,
        simulation: bool = False,
        open_to_all: bool = False,
    ) -> None:
        """Prepare the commands; `start` starts them.

        processes: start the commands. folder: keeps the runs' data, so that a restarted SuperLink goes on with them.
        identity: None for no encryption. simulation: nodes are simulated.
        open_to_all: whether other machines may start runs, too.
        """
        self.processes, self.port, self.identity = processes, port, identity
        self.commands: dict[str, list[str]] = {}
        """By name, the commands of the processes, to restart them."""
        secret = folder / "superexec.secret"
        if not secret.exists():
            write_secret(secret, secrets.token_bytes(32))
        trust, certificates = ["--insecure"], ["--insecure"]
        if identity is not None:
            trust = ["--root-certificates", str(identity.authority)]
            certificates = ["--ssl-ca-certfile", str(identity.authority), "--ssl-certfile", str(identity.certificate)]
            certificates += ["--ssl-keyfile", str(identity.key), NEEDS_KEYS]
        authentication = ["--superexec-auth-secret-file", str(secret)]
        # Apps are not children of the SuperLink: they survive one that is killed, and find the next one by its port.
        isolation = ["--isolation", "process", "--database", str(folder / "state.db")]
        self.commands[SUPERLINK] = [
            *PROGRAM,
            *certificates,
            *("--host", host, "--port", str(port)),
            *isolation,
            *authentication,
            *(["--simulation"] if simulation else []),
            *([OPEN_TO_ALL] if open_to_all else []),
        ]
        self.commands[SUPEREXEC] = [
            *APP_STARTER,
            *("--runtime-api-address", f"{find_local_address(host)}:{port}"),
            *trust,
            *authentication,
        ]

    @property
    def address(self) -> str:
        """Where this machine reaches the SuperLink."""
        return self.connection.address

    @property
    def connection(self) -> SuperLinkAddress:
        """Where this machine reaches the SuperLink, and how it trusts it."""
        authority = None if self.identity is None else self.identity.authority
        return SuperLinkAddress(f"{LOOPBACK}:{self.port}", authority)

    def start(self) -> None:
        """Start the processes, and wait until the SuperLink listens."""
        self.begin()
        self.wait()

    def begin(self) -> None:
        """Start the processes: where that is possible, as forks of one that imports what they need."""
        if is_possible() and self.processes.logs is not None and all(map(is_program, self.commands.values())):
            self.processes.launch({name: command[len(PYTHON) :] for name, command in self.commands.items()})
            return
        for name, command in self.commands.items():
            self.processes.start(name, command)

    def wait(self) -> None:
        """Wait until the SuperLink listens; RuntimeError with the end of its log if it ends or takes too long."""
        wait_until_listening(self.processes, self.port)


@final
class Restarter:
    """Restarts processes that have ended: a SuperLink goes on with its runs, a node with its messages."""

    def __init__(
        self, processes: SupervisedProcesses, commands: Mapping[str, Sequence[str]], pause: float = 1.0
    ) -> None:
        """pause: seconds before the first restart, doubled with each restart that is not stable."""
        self.processes, self.commands, self.pause = processes, commands, pause
        self.exit_codes: dict[str, int] = {}
        """By name, the exit code before the latest restart."""
        self._ended: dict[str, float] = {}
        self._restarted: dict[str, float] = {}
        self._pauses: dict[str, float] = {}

    def restart_ended(self) -> list[str]:
        """Restart the processes that have ended and whose pause is over; return their names."""
        now, restarted = time.monotonic(), []
        for name, command in self.commands.items():
            code = self.processes.exit_code(name)
            if code is None:
                continue
            if name not in self._ended:
                self._ended[name], self.exit_codes[name] = now, code
                was_stable = now - self._restarted.get(name, -STABLE_AFTER) > STABLE_AFTER
                self._pauses[name] = self.pause if was_stable else min(2 * self._pauses[name], LONGEST_PAUSE)
            if now >= self._ended[name] + self._pauses[name]:
                del self._ended[name]
                self._restarted[name] = now
                self.processes.start(name, command)
                restarted.append(name)
        return restarted


def wait_until_listening(processes: SupervisedProcesses, port: int) -> None:
    """Wait until a SuperLink listens; RuntimeError with the end of its log if it ends or takes too long."""
    until = time.monotonic() + START_DEADLINE
    while True:
        code = processes.exit_code(SUPERLINK)
        if code is not None or time.monotonic() > until:
            what = f"did not listen within {START_DEADLINE:g} s" if code is None else f"ended with {code}"
            raise RuntimeError(f"Flower's SuperLink {what}; the end of its log:\n{processes.tail(SUPERLINK)}")
        try:
            socket.create_connection((LOOPBACK, port), 1).close()
        except OSError:
            time.sleep(POLL)
        else:
            return


def is_program(command: Sequence[str]) -> bool:
    """Return whether a command starts a program of ours."""
    return list(command[: len(PYTHON)]) == PYTHON


def find_script(name: str) -> str:
    """Find one of the commands that are installed with Flower; RuntimeError if it is missing."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise RuntimeError(f"{path}: is missing; install flwr into this environment")
    return str(path)


def find_local_address(host: str) -> str:
    """Return the address at which this machine reaches what listens on `host`."""
    return {"0.0.0.0": LOOPBACK, "::": LOOPBACK}.get(host, host)


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that only its owner may read, from the moment it exists."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
