"""Flower's command line, `flwr`, and its configuration of connections to SuperLinks."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import tomli_w

from grpo_fed.runs.files import write_atomic


@dataclass(frozen=True)
class RunStatus:
    """What Flower says about a run."""

    stage: str
    """pending, starting, running or finished."""
    outcome: str
    """Of a finished run: completed, failed or stopped."""
    details: str


@final
class FlwrCommand:
    """Calls `flwr` for one connection of its configuration; its methods raise RuntimeError with Flower's words."""

    def __init__(self, connection: str, environment: Mapping[str, str], folder: Path) -> None:
        """folder: where the commands are called, and where run configurations are written."""
        self.connection, self.environment, self.folder = connection, environment, folder

    def start(self, app: Path, run_config: Mapping[str, Any], federation: Sequence[str] = ()) -> str:
        """Start a run and return its id. federation: settings of the simulation, `key=value`."""
        config = self.folder / "run.toml"
        write_atomic(config, tomli_w.dumps(run_config))
        options = ["--run-config", str(config)]
        for setting in federation:
            options += ["--federation-config", setting]
        return str(self._call("run", str(app), self.connection, *options)["run-id"])

    def status(self, run: str) -> RunStatus:
        """Return the status of a run."""
        (entry,) = self._call("list", self.connection, "--run-id", run)["runs"]
        stage, _, outcome = entry["status"].partition(":")
        return RunStatus(stage, outcome, entry["status-details"])

    def list_runs(self) -> list[dict[str, Any]]:
        """Return all runs, as Flower lists them."""
        return list(self._call("list", self.connection)["runs"])

    def list_nodes(self) -> list[dict[str, Any]]:
        """Return all nodes, as Flower lists them."""
        return list(self._call("supernode", "list", self.connection)["nodes"])

    def stop(self, run: str) -> None:
        """Stop a run."""
        self._call("stop", run, self.connection)

    def register(self, key: Path, client: str) -> str:
        """Accept a client's node by its public key, and return the node's id."""
        return str(self._call("supernode", "register", str(key), self.connection, "--name", client)["node-id"])

    def unregister(self, node: str) -> None:
        """Accept a node no longer."""
        self._call("supernode", "unregister", node, self.connection)

    def log_command(self, run: str) -> list[str]:
        """Return the command that prints a run's log until the run ends."""
        return [find_script("flwr"), "log", run, self.connection, "--stream"]

    def _call(self, *arguments: str) -> dict[str, Any]:
        """Return what a command answers as JSON. Its exit code does not say whether it failed."""
        done = subprocess.run(
            [find_script("flwr"), *arguments, "--format", "json"],
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


def find_script(name: str) -> str:
    """Find one of the commands that are installed with Flower; RuntimeError if it is missing."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise RuntimeError(f"{path}: is missing; install flwr into this environment")
    return str(path)


# Connections ---------------------------------------------------------------------------------------------------------


def find_flower_home() -> Path:
    """Return the folder with the configuration of Flower's command line."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def write_connection(home: Path, name: str, address: str, authority: Path | None) -> None:
    """Write a connection into Flower's configuration, and keep the others.

    authority: the certificate that signed the SuperLink's; without it, the connection is not encrypted.
    """
    path = home / "config.toml"
    config = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    trust = {"insecure": True} if authority is None else {"root-certificates": str(authority)}
    connection = {"address": address, **trust}
    connections = config.setdefault("superlink", {"default": name})
    if connections.get(name) != connection:
        connections[name] = connection
        home.mkdir(parents=True, exist_ok=True)
        write_atomic(path, tomli_w.dumps(config))


def check_connection(name: str) -> None:
    """Raise ValueError if Flower's configuration has no connection of that name."""
    path = find_flower_home() / "config.toml"
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("superlink", {}) if path.is_file() else {}
    names = [key for key, value in entries.items() if isinstance(value, dict)]
    if name not in names:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise ValueError(
            f"{path}: has no SuperLink {name}, {has}; `grpo-fed deploy server` adds the one that it starts"
        )
