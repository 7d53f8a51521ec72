"""Warnings of libraries: a line each, without escape codes, once in all processes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from grpo_fed.runs.library_warnings import FOLDER, join_process, show_warnings_once, warning_line

COLOURED = "\x1b[33mWARN: The environment\n is old.\x1b[0m"
PLACE = "/opt/env/lib/python3.11/site-packages/gymnasium/envs/registration.py"
LINE = "warning: The environment is old. (UserWarning, gymnasium/envs/registration.py:732)"


def test_a_warning_is_a_line_without_escape_codes():
    assert warning_line(UserWarning(COLOURED), UserWarning, PLACE, 732) == LINE


def test_a_warning_is_shown_once_by_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with warnings.catch_warnings():
        show_warnings_once()
        warnings.showwarning(UserWarning(COLOURED), UserWarning, PLACE, 732)
        pid = os.fork()
        if pid == 0:
            join_process()
            warnings.showwarning(UserWarning(COLOURED), UserWarning, PLACE, 732)
            warnings.showwarning(UserWarning("another"), UserWarning, PLACE, 7)
            os._exit(0)
        os.waitpid(pid, 0)
    assert capfd.readouterr().err.splitlines() == [
        LINE,
        "warning: another (UserWarning, gymnasium/envs/registration.py:7)",
    ]


def test_a_process_of_another_program_shows_warnings_as_python_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(FOLDER, raising=False)
    with warnings.catch_warnings():
        before = warnings.showwarning
        join_process()
        assert warnings.showwarning is before
