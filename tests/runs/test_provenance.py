"""A run's folder says with which command, commit and versions it was made."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from grpo_fed.runs import provenance
from grpo_fed.runs.provenance import PROVENANCE, Provenance, read_provenance, write_provenance


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *names, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_passwords_of_addresses_are_left_out():
    made = Provenance.of_process(["run", "my carts.toml", "--track", "https://me:secret@host:1/x"])
    assert made.command == "grpo-fed run 'my carts.toml' --track https://host:1/x"
    assert {"python", "torch", "numpy"} <= set(made.versions)


def test_the_commit_is_that_of_the_source_with_a_remark_if_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = tmp_path / "grpo_fed" / "runs" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert Provenance.of_process([]).commit == ""
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert Provenance.of_process([]).commit == commit
    module.write_text("changed")
    assert Provenance.of_process([]).commit == f"{commit} with changes"


def test_the_first_command_of_a_run_stays(tmp_path: Path):
    assert read_provenance(tmp_path) is None
    first = Provenance("grpo-fed run a", "0123", {"python": "3.11.1", "torch": "2.13.0"})
    write_provenance(tmp_path, first)
    write_provenance(tmp_path, Provenance("grpo-fed run --resume a", "", {}))
    assert read_provenance(tmp_path) == first
    assert first.sentence == "commit 0123, python 3.11.1, torch 2.13.0"


def test_a_damaged_file_names_its_cure(tmp_path: Path):
    (tmp_path / PROVENANCE).write_text(json.dumps({"command": 1}))
    with pytest.raises(ValueError, match=r"provenance\.json: is damaged: .*; remove it"):
        read_provenance(tmp_path)
