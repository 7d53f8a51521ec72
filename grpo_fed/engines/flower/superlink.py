"""Flower's processes and its command line, as we use them: a SuperLink of our own, its nodes, runs on either.

Flower's shared local SuperLink runs every app from the folder it was first started in, so we start one of our own, with
its own `FLWR_HOME`, port and folder. Nothing here looks for updates, reports use or installs anything.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import tomli_w

from grpo_fed.engines.flower.processes import POLL, SupervisedProcesses
from grpo_fed.runs.files import write_atomic

STATE = "GRPO_FED_STATE"
"""Names the folder in which clients keep their state."""
KEYS = "GRPO_FED_KEYS"
"""Names the file that says for which client each key was made that a server lets in."""

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # it would install torch anew for every run
    "RAY_USAGE_STATS_ENABLED": "0",
}

POLLING = "0.25"
"""Seconds between two looks for an app to start: at 0.05 an idle node takes an eighth of a core, at 1 rounds drag."""

SUPERLINK, SUPEREXEC = "superlink", "superexec"
"""Names of processes: what nodes connect to, and what starts apps on its behalf."""
LOOPBACK = "127.0.0.1"
START = 60.0
"""Seconds that a SuperLink may take to answer."""
LASTING, LONGEST = 60.0, 10.0
"""Seconds after which a process is taken to run well; the longest pause before it is started again."""


@dataclass(frozen=True)
class Identity:
    """What a SuperLink shows to those who connect: with it, connections are encrypted and nodes need keys."""

    authority: Path
    """Certificate that signed the next."""
    certificate: Path
    key: Path


@dataclass(frozen=True)
class RunStatus:
    """What Flower says of a run."""

    stage: str
    """pending, starting, running or finished."""
    outcome: str
    """Of a finished one: completed, failed or stopped."""
    details: str


def environment(home: Path | None = None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For Flower's processes: this one's, with Flower's commands in reach and nothing that needs a network.

    Modules of the user's own, in the folder this was started in, are found by apps too.
    """
    path = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    modules = [os.environ.get("PYTHONPATH", ""), str(Path.cwd())]
    direct = [os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), f"{LOOPBACK},localhost"]
    return {
        **os.environ,
        **OFFLINE,
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLLING,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join(filter(None, path)),
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "NO_PROXY": ",".join(filter(None, direct)),
        **({} if home is None else {"FLWR_HOME": str(home)}),
        **(more or {}),
    }


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])


def names_of_keys() -> dict[int, str] | None:
    """By node, for which client its key was made, where the server knows that: in a process that it started."""
    path = os.environ.get(KEYS)
    if path is None:
        return None
    registered = json.loads(Path(path).read_text(encoding="utf-8"))
    return {int(entry["node"]): client for client, entry in registered.items()}


# Starting them -------------------------------------------------------------------------------------------------------


@final
class SuperLink:
    """A SuperLink and what starts apps for it, among `processes`; each can be started again when it has ended."""

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
        """In `folder` it keeps what runs are to find again when it was killed and started anew.

        open_to_all: whoever reaches the port may start runs, not only this machine.
        """
        self.processes, self.port, self.identity = processes, port, identity
        secret = folder / "superexec.secret"
        if not secret.exists():
            write_secret(secret, secrets.token_bytes(32))
        self._trust = ["--insecure"] if identity is None else ["--root-certificates", str(identity.authority)]
        shows = ["--insecure"]
        if identity is not None:
            shows = ["--ssl-ca-certfile", str(identity.authority), "--ssl-certfile", str(identity.certificate)]
            shows += ["--ssl-keyfile", str(identity.key), "--enable-supernode-auth"]
        shared = ["--superexec-auth-secret-file", str(secret)]
        program = (
            [script("flower-superlink")] if open_to_all else [sys.executable, "-m", "grpo_fed.engines.flower.access"]
        )
        where = ["--host", host, "--port", str(port)]
        # Apps live beside it, not below it: they outlive a SuperLink that is killed, and find the next by its port.
        apart = ["--isolation", "process", "--database", str(folder / "state.db")]
        self.commands = {
            SUPERLINK: [*program, *shows, *where, *apart, *shared, *(["--simulation"] if simulation else [])],
            SUPEREXEC: [
                *(script("flower-superexec"), "--runtime-api-address", f"{local(host)}:{port}"),
                *(*self._trust, *shared),
            ],
        }

    @property
    def address(self) -> str:
        """Where this machine reaches it."""
        return f"{LOOPBACK}:{self.port}"

    def start(self) -> None:
        """Start both, and wait until it answers."""
        for name, command in self.commands.items():
            self.processes.start(name, command)
        wait_for(self.processes, self.port)

    def add_node(self, client: str, key: Path | None = None) -> None:
        """Start a SuperNode for a client, on this machine."""
        authority = None if self.identity is None else self.identity.authority
        name = node_name(client)
        self.commands[name] = node_command(client, self.address, authority, key)
        self.processes.start(name, self.commands[name])


@final
class Restarter:
    """Starts again what has ended: a SuperLink goes on where it was, a node is let in again within a minute."""

    def __init__(
        self, processes: SupervisedProcesses, commands: Mapping[str, Sequence[str]], pause: float = 1.0
    ) -> None:
        """`pause`: seconds before the first new start, doubled with each that does not last."""
        self.processes, self.commands, self.pause = processes, commands, pause
        self.codes: dict[str, int] = {}
        """What each that was started again had ended with."""
        self._ended: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._pauses: dict[str, float] = {}

    def look(self) -> list[str]:
        """The names of those that were started again now."""
        now, started = time.monotonic(), []
        for name, command in self.commands.items():
            code = self.processes.ended(name)
            if code is None:
                continue
            if name not in self._ended:
                self._ended[name], self.codes[name] = now, code
                lasted = now - self._began.get(name, -LASTING) > LASTING
                self._pauses[name] = self.pause if lasted else min(2 * self._pauses[name], LONGEST)
            if now >= self._ended[name] + self._pauses[name]:
                del self._ended[name]
                self._began[name] = now
                self.processes.start(name, command)
                started.append(name)
        return started


def node_command(client: str, superlink: str, authority: Path | None, key: Path | None) -> list[str]:
    """Of a client's SuperNode; without an authority its connection is not encrypted."""
    trust = ["--insecure"] if authority is None else ["--root-certificates", str(authority)]
    proof = [] if key is None else ["--auth-supernode-private-key", str(key)]
    config = f"client={json.dumps(client)}"
    own = ["--port", str(free_port()), "--node-config", config]
    return [script("flower-supernode"), *trust, *proof, "--superlink", superlink, *own]


def node_name(client: str) -> str:
    """Of the process."""
    return f"node-{client}"


def wait_for(processes: SupervisedProcesses, port: int) -> None:
    """Until a SuperLink listens; RuntimeError with its last words if it ends or takes too long."""
    until = time.monotonic() + START
    while True:
        code = processes.ended(SUPERLINK)
        if code is not None or time.monotonic() > until:
            what = f"did not answer within {START:g} s" if code is None else f"ended with {code}"
            raise RuntimeError(f"Flower's SuperLink {what}; its last words:\n{processes.tail(SUPERLINK)}")
        try:
            socket.create_connection((LOOPBACK, port), 1).close()
        except OSError:
            time.sleep(POLL)
        else:
            return


def local(host: str) -> str:
    """Where this machine reaches what listens on `host`."""
    return {"0.0.0.0": LOOPBACK, "::": LOOPBACK}.get(host, host)


def script(name: str) -> str:
    """One of the commands that came with Flower."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise RuntimeError(f"{path}: is missing; install flwr into this environment")
    return str(path)


def write_secret(path: Path, content: bytes) -> None:
    """A new file that its owner alone may read, from the first moment on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


# Flower's command line -----------------------------------------------------------------------------------------------


def connect(home: Path, name: str, address: str, authority: Path | None) -> None:
    """Write a connection into Flower's configuration, beside those that are there."""
    path = home / "config.toml"
    config = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    trust = {"insecure": True} if authority is None else {"root-certificates": str(authority)}
    connection = {"address": address, **trust}
    links = config.setdefault("superlink", {"default": name})
    if links.get(name) != connection:
        links[name] = connection
        home.mkdir(parents=True, exist_ok=True)
        write_atomic(path, tomli_w.dumps(config))


def refuse_unknown(name: str) -> None:
    """ValueError for a connection that Flower's configuration does not have."""
    path = flower_home() / "config.toml"
    links = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {}) if path.is_file() else {}
    known = [key for key, value in links.items() if isinstance(value, dict)]
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{path}: has no SuperLink {name}, {has}; `grpo-fed deploy server` writes its own there")


def flower_home() -> Path:
    """Where Flower's command line has its configuration."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


@final
class Flower:
    """`flwr`, over one connection of its configuration."""

    def __init__(self, connection: str, environment: Mapping[str, str], folder: Path) -> None:
        self.connection, self.environment, self.folder = connection, environment, folder

    def start(self, app: Path, run_config: Mapping[str, Any], federation: Sequence[str] = ()) -> str:
        """Start a run; its id."""
        config = self.folder / "run.toml"
        write_atomic(config, tomli_w.dumps(run_config))
        options = ["--run-config", str(config), *(part for one in federation for part in ("--federation-config", one))]
        return str(self._tell("run", str(app), self.connection, *options)["run-id"])

    def status(self, run: str) -> RunStatus:
        """Where it stands."""
        (found,) = self._tell("list", self.connection, "--run-id", run)["runs"]
        stage, _, outcome = found["status"].partition(":")
        return RunStatus(stage, outcome, found["status-details"])

    def stop(self, run: str) -> None:
        """Stop it."""
        self._tell("stop", run, self.connection)

    def register(self, key: Path, client: str) -> str:
        """Let a client's node in, by its public key; the node's id."""
        return str(self._tell("supernode", "register", str(key), self.connection, "--name", client)["node-id"])

    def unregister(self, node: str) -> None:
        """Let it in no longer."""
        self._tell("supernode", "unregister", node, self.connection)

    def following(self, run: str) -> list[str]:
        """The command that prints a run's log until it ends."""
        return [script("flwr"), "log", run, self.connection, "--stream"]

    def _tell(self, *arguments: str) -> dict[str, Any]:
        """What a command answers as JSON; RuntimeError with its words where it fails. Its exit code says nothing."""
        done = subprocess.run(
            [script("flwr"), *arguments, "--format", "json"],
            env=dict(self.environment),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {}
        if not answer.get("success"):
            words = answer.get("error-message") or (done.stderr + done.stdout).strip()[-2000:]
            raise RuntimeError(f"flwr {arguments[0]} failed: {str(words).strip()}")
        return answer
