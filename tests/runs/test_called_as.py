"""Commands in messages name the program as the user called it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grpo_fed.runs.called_as import called_as


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an environment's `grpo-fed` in a folder, beside which the shell is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    script = tmp_path / "my env" / "bin" / "grpo-fed"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return script


def test_a_program_off_the_path_is_named_as_it_was_typed(script: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["my env/bin/grpo-fed", "run"])
    assert called_as() == "'my env/bin/grpo-fed'"
    assert called_as(anywhere=True) == f"'{script}'"


def test_a_program_on_the_path_has_its_name_alone(script: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert called_as() == called_as(anywhere=True) == "grpo-fed"


def test_another_program_on_the_path_is_not_mistaken_for_it(script: Path, monkeypatch: pytest.MonkeyPatch):
    other = script.parents[2] / "other" / "grpo-fed"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert called_as() == f"'{script}'"


def test_a_module_is_called_with_its_python(script: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/a/grpo_fed/__main__.py", "run"])
    monkeypatch.setattr(sys, "executable", "/b/bin/python")
    assert called_as() == "/b/bin/python -m grpo_fed"
    python = script.with_name("python")
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.setattr(sys, "executable", str(python))
    assert called_as() == "python -m grpo_fed"


def test_a_program_that_uses_the_library_is_told_the_command(monkeypatch: pytest.MonkeyPatch):
    for name in ("notebook.py", "", "/usr/bin/pytest"):
        monkeypatch.setattr(sys, "argv", [name])
        assert called_as() == "grpo-fed"
