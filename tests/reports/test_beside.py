"""Work in a process beside this one."""

from __future__ import annotations

import os
import threading

import pytest

from grpo_fed.reports.beside import begin_beside


def test_work_is_done_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    wait = begin_beside(lambda: f"films by {os.getpid()}")
    text = wait()
    assert text.startswith("films by ")
    assert text != f"films by {os.getpid()}"


def test_what_work_raises_and_that_it_was_killed_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(threading, "active_count", lambda: 1)

    def fail() -> str:
        raise ValueError("no lamp")

    with pytest.raises(RuntimeError, match="ValueError: no lamp"):
        begin_beside(fail)()
    with pytest.raises(RuntimeError, match="was killed"):
        begin_beside(lambda: os._exit(9))()  # type: ignore[return-value]


def test_on_one_core_work_waits_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    done = []
    wait = begin_beside(lambda: done.append(os.getpid()) or "done")  # type: ignore[func-returns-value]
    assert done == []
    assert wait() == "done"
    assert done == [os.getpid()]
