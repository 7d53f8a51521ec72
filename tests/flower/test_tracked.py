"""What Grouped sends to MLflow; tests/runs/test_tracking.py has a store that takes it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.flower import Grouped, GroupedRound
from grpo_fed.flower.grouped_round import tracked_numbers
from grpo_fed.runs.tracking.nested_runs import NestedRuns


def test_numbers_have_the_keys_of_our_own_runs_and_the_whole_has_the_clients_means():
    record = GroupedRound(
        3,
        weights={"a": 1.0, "b": 3.0},
        failures={"c": "gone"},
        step=AcceptedStep((AcceptedBlock("actor", 0.4, 0.1, 0.5, 0.1),), 0.4, math.inf, 0.2),
        kl={"a": 0.3},
        rho={"a": {"actor:rows[0]": 0.2, "actor:rows[1]": 0.7}},
        departed={"b": ("actor:rows[0]",)},
        train={"a": {"loss": 1.0}, "b": {"loss": 2.0}},
        evaluate={"b": {"return": 9.0}},
    )
    whole, clients = tracked_numbers(record, {"actor:rows[0]": "actor", "actor:rows[1]": "actor"})
    assert whole == {
        "fed/clients_ok": 2,
        "fed/clients_failed": 1,
        "fed/personal_groups": 1,
        "alpha/actor": 0.5,
        "kl/actor": 0.1,
        "kl/joint": 0.2,
        "train/loss": 1.5,
        "eval/return": 9.0,
    }
    assert clients == {
        "a": {"fed/personal_groups": 0, "train/loss": 1.0, "kl/joint": 0.3, "rho/actor": 0.7},
        "b": {"fed/personal_groups": 1, "train/loss": 2.0, "eval/return": 9.0},
    }


class FailingClient:
    """A store that fails at first."""

    def __init__(self, failures: int) -> None:
        self.failures, self.sent = failures, []

    def log_batch(self, run: str, metrics: list[object]) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError("down")
        self.sent += [(run, metric.key, metric.value, metric.step) for metric in metrics]

    def set_terminated(self, run: str, status: str) -> None:
        self.sent.append((run, status))


def test_what_a_store_does_not_take_is_sent_with_the_next_round(tmp_path: Path):
    runs = NestedRuns(f"sqlite:///{tmp_path}/mlflow.db", "carts", "whole", {})
    store = runs._client = FailingClient(1)
    runs._runs = {"": "r0", "ant": "r1"}
    runs.round(1, {"x": 1.0}, {"ant": {"y?": 2.0}})
    assert store.sent == []
    runs.round(2, {"x": 3.0, "inf": math.inf}, {"ant": {"y?": 4.0}})
    assert store.sent == [("r0", "x", 1.0, 1), ("r0", "x", 3.0, 2), ("r1", "y_", 2.0, 1), ("r1", "y_", 4.0, 2)]
    runs.close("FINISHED")
    assert store.sent[4:] == [("r0", "FINISHED"), ("r1", "FINISHED")]


@pytest.mark.parametrize("uri", ["nowhere", "off"])
def test_an_address_that_names_no_store_is_refused_before_the_first_round(uri: str):
    with pytest.raises(ValueError, match="store"):
        Grouped(mlflow=uri)
