"""The table of deployed rounds: medians of runs, ratios to the local engine, and whether the targets are reached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deployment import ROUNDS, format_table
from benchmarks.deployment_trial import measure_processor_time


def line(contestant: str, *seconds: float) -> dict[str, Any]:
    return {
        "contestant": contestant,
        "seconds": list(seconds),
        "cpu_seconds": 2 * seconds[0],
        "whole_seconds": 30.0,
        "load": 1.0,
    }


def test_the_table_has_medians_of_medians_and_ratios():
    lines = [
        line("before", 20.0), line("fleet", 4.0),
        line("exchange", 1.0, 9.0, 1.5), line("exchange", 1.0), line("exchange", 2.0),
        line("local", 0.4, 0.5, 0.6),
    ]  # fmt: skip
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
        for row in format_table(lines)
        if "|" in row
    }
    assert rows["the resident node with waiting requests"] == ["1.50", "3.0x", "2.00", "30", "1", "3"]
    assert rows["the local engine"] == ["0.50", "1.0x", "0.80", "30", "1", "1"]
    notes = [row for row in format_table(lines) if row.startswith("-")]
    assert [note.rpartition(", ")[2] for note in notes] == ["reached.", "missed."]
    assert "13.3 times" in notes[1]


def test_there_is_no_table_without_all_contestants():
    assert list(format_table([line(name, 1.0) for name in ROUNDS if name != "local"])) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_processor_time_counts_this_process():
    before = measure_processor_time(os.getpid())
    sum(index * index for index in range(2_000_000))
    assert before < measure_processor_time(os.getpid()) < before + 10
