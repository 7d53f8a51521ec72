"""The interface of learners: what they report, how states are put together, and who may know more."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from grpo_fed.rl.learner import join_states, sub_state
from grpo_fed.rl.records import Episode, TrainingReport

FEDERATION = Path(__file__).parents[2] / "grpo_fed" / "federation"
INTERFACE = {"learner", "make", "records", "rng"}
"""Modules of the learning room that the federation may import."""


def test_reported_metrics_match_a_worked_example() -> None:
    episodes = (Episode(3.0, 10, True), Episode(5.0, 20, False))
    report = TrainingReport("a", 30, episodes, {"policy_loss": -0.5, "kl": float("nan")})
    expected = {"charts/episodic_return": 4.0, "charts/episodic_length": 15.0, "losses/policy_loss": -0.5}
    assert report.metrics() == expected
    assert report.metrics(2.5) == expected | {"charts/seconds": 2.5}


def test_a_report_without_episodes_has_no_return() -> None:
    report = TrainingReport("a", 30, (), {"entropy": 1.0})
    assert np.isnan(report.mean_return)
    assert report.metrics() == {"losses/entropy": 1.0}


def test_a_joined_state_is_taken_apart_again() -> None:
    parts = {"own": {"a.b": np.zeros(1), "c": np.ones(2)}, "rollout": {"c": np.arange(3)}}
    joined = join_states(parts)
    assert set(joined) == {"own.a.b", "own.c", "rollout.c"}
    for name, part in parts.items():
        taken = sub_state(joined, name)
        assert taken.keys() == part.keys()
        assert all(taken[key] is part[key] for key in part)


def test_the_federation_imports_only_the_interface_of_learning() -> None:
    modules = {
        node.module.removeprefix("grpo_fed.rl.")
        for path in FEDERATION.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("grpo_fed.rl")
    }
    assert {"learner", "make"} <= modules <= INTERFACE
