"""RunOrigin: what a run was started from and on, for its name and its tags in MLflow."""

from __future__ import annotations

import getpass
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from grpo_fed.runs.tracking.store import HIDDEN, find_secrets, hide_password
from grpo_fed.scenario.toml.text import shorten

PACKAGES = ("grpo-fed", "torch", "numpy", "gymnasium", "flwr", "mlflow")
"""Packages whose versions are tags."""
PATIENCE = 2.0
"""Seconds that git may take."""
LONGEST_NAME, LONGEST_TAG = 200, 4000
"""Characters of a run's name, and of a tag."""
IN_EVERY_NAME = ("method", "seed")
"""Keys that every run's name has, so that a change of them is not repeated."""


@dataclass(frozen=True)
class RunOrigin:
    """Holds what a command started a run with."""

    engine: str = "local"
    changes: tuple[str, ...] = ()
    """What `--set` changed, as KEY=VALUE."""
    register: bool = False
    """Whether the clients' models are registered."""


def run_name(method: str, seed: int, origin: RunOrigin) -> str:
    """Name a run by what tells it apart: its method, its seed, what was changed, and the engine if it is not local."""
    changes = [change for change in origin.changes if change.partition("=")[0].strip() not in IN_EVERY_NAME]
    engine = [] if origin.engine == "local" else [origin.engine]
    return shorten(", ".join([f"{method} seed {seed}", *changes, *engine]), LONGEST_NAME)


def origin_tags(
    origin: RunOrigin, command: Sequence[str] = tuple(sys.argv), environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Make a run's tags: command, commit, engine, host and versions, without passwords.

    They are under names of ours, and some also under MLflow's own, whose pages show the end of a path as the source.
    """
    secrets = find_secrets(environment)
    program, *words = command or ("",)
    is_ours = program.endswith(("/grpo-fed", "grpo_fed/__main__.py"))  # the same command by its two paths
    words = ["grpo-fed" if is_ours else program, *words]
    text = shlex.join(_hide(hide_password(word), secrets) for word in words)[:LONGEST_TAG]
    tags = {"command": text, "engine": origin.engine, "host": socket.gethostname()}
    tags |= {"mlflow.source.name": " ".join(words[:2]), "mlflow.source.type": "LOCAL", "mlflow.user": _find_user()}
    if commit := find_commit():
        tags |= {"commit": commit, "mlflow.source.git.commit": commit.split()[0]}
    tags["version.python"] = platform.python_version()
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return tags


def find_commit() -> str | None:
    """Find the commit of the working folder, with a remark if files have changed since; None without a repository."""
    commit = _ask_git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _ask_git("status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _ask_git(*arguments: str) -> str | None:
    """Return what git prints; None where it fails, or is not there. Nothing that a repository names is executed."""
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip()


def _hide(word: str, secrets: Sequence[str]) -> str:
    """Replace the secrets in a word by stars."""
    for secret in secrets:
        word = word.replace(secret, HIDDEN)
    return word


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have a user without a name
        return ""
