"""The horizontal axis of figures counts rounds, steps or bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo_fed.reports.axis import XAxis, x_axis
from grpo_fed.reports.figures.learning import draw_learning
from grpo_fed.runs.history import read_history
from tests.support.sample_run_folder import SampleRun, sample_scenario, write_run


def test_steps_and_bytes_add_up_over_the_rounds(tmp_path: Path):
    history = read_history(write_run(tmp_path, sample_scenario(more="rounds = 3"), SampleRun()))
    sent = [line["comm/MB_up"] + line["comm/MB_down"] for line in history.lines]
    assert x_axis(history, "bytes").values.tolist() == pytest.approx([sent[0], sent[0] + sent[1], sum(sent)])
    assert x_axis(history, "steps").values.tolist() == [line["global_step"] for line in history.lines]
    assert x_axis(history).values.tolist() == [1, 2, 3]


def test_many_bytes_are_counted_in_gigabytes(tmp_path: Path):
    history = read_history(write_run(tmp_path, sample_scenario(more="rounds = 2"), SampleRun()))
    lines = [{**line, "comm/MB_up": 400.0, "comm/MB_down": 600.0} for line in history.lines]
    axis = x_axis(replace(history, lines=lines), "bytes")
    assert (axis.values.tolist(), axis.label) == ([1.0, 2.0], "GB sent by all")


def test_levels_begin_with_their_round_and_the_last_one_ends_half_a_round_later():
    assert XAxis("rounds", np.array([1, 2, 3]), "", "").edges.tolist() == [0.5, 2, 3, 3.5]
    assert XAxis("steps", np.array([100.0, 200.0, 300.0]), "", "").edges.tolist() == [50, 200, 300, 350]


def test_a_run_that_sends_nothing_has_no_axis_of_bytes(tmp_path: Path):
    made = SampleRun(federated=False)
    history = read_history(write_run(tmp_path, sample_scenario(more='method = "local"\nrounds = 2'), made))
    with pytest.raises(ValueError, match="--x bytes: its clients sent nothing; use --x rounds or --x steps"):
        x_axis(history, "bytes")
    assert x_axis(history, "bytes", in_megabytes=True).values.tolist() == [0, 0]


def test_the_figure_of_returns_has_the_axis_that_its_history_asks_for(tmp_path: Path):
    history = read_history(write_run(tmp_path, sample_scenario(more="rounds = 3"), SampleRun()))
    for axis, title, label in (
        ("rounds", "Return by round", "round"),
        ("steps", "Return by environment step", "environment steps of all clients"),
        ("bytes", "Return by bytes sent", "MB sent by all"),
    ):
        drawing = draw_learning(replace(history, axis=axis))
        assert drawing is not None
        assert drawing.title == title
        assert f">{label}<" in drawing.bare_svg
