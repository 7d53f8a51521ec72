"""Provenance: the command, the commit and the versions that a run was made with, `provenance.json` in its folder."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from grpo_fed.runs.called_as import NAME
from grpo_fed.runs.files import refuse_links, write_atomic
from grpo_fed.runs.serialisation import from_json, read_json

PROVENANCE = "provenance.json"
PACKAGES = ("grpo-fed", "torch", "numpy", "gymnasium", "flwr")
"""Packages on whose versions the numbers of a run may depend."""
PATIENCE = 5.0
"""Seconds that git may take."""
PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
"""The name and the password in an address."""


@dataclass(frozen=True)
class Provenance:
    """What it takes to make a run again, beside its scenario."""

    command: str
    """The command line, without passwords."""
    commit: str
    """The commit of the package's source, with a remark if files have changed since; empty outside a repository."""
    versions: Mapping[str, str]
    """Of Python and of the packages."""

    @classmethod
    def of_process(cls, arguments: Sequence[str] | None = None) -> Self:
        """Describe this process. arguments: those of the command, by default of this process."""
        words = [NAME, *(sys.argv[1:] if arguments is None else arguments)]
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:  # the package is used from its source
                continue
        return cls(PASSWORD.sub("", shlex.join(words)), _find_source_commit(Path(__file__).parents[2]), versions)

    @property
    def sentence(self) -> str:
        """The commit and the versions in words."""
        known = [f"{name} {number}" for name, number in self.versions.items()]
        return ", ".join([*([f"commit {self.commit}"] if self.commit else []), *known])


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Write the file, unless the run has one already: a run that is resumed was made by its first command."""
    if not (folder / PROVENANCE).exists():
        write_atomic(folder / PROVENANCE, json.dumps(asdict(provenance), indent=2) + "\n")


def read_provenance(folder: Path) -> Provenance | None:
    """Read the file; None if the run has none, as those from Python; ValueError if it is damaged."""
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    refuse_links(folder, path)
    try:
        return from_json(Provenance, read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}; remove it: a report can be written without it") from None


def _find_source_commit(source: Path) -> str:
    if not (source / ".git").exists():
        return ""
    commit = _ask_git(source, "rev-parse", "--short=12", "HEAD")
    changed = commit and _ask_git(source, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _ask_git(source: Path, *arguments: str) -> str:
    """Return what git prints, and nothing where it fails or is not there. Hooks of the repository are not run."""
    command = ["git", "-C", str(source), "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
