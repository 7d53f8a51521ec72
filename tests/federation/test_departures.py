"""Departures with real learners: who leaves, by which evidence and by which returns, and that it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grpo_fed
from grpo_fed.engines.start import resume
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario

SCENARIO = """
name = "wired"
rounds = 8
steps = 1024
[rollout]
num_envs = 8
horizon = 128
[objective]
learning_rate = 1e-2
epochs = 4
minibatches = 4
[proximity]
mode = "off"
[merge]
rejoin = 3
episodes = 8
[checkpoint]
every = 1
[evaluate]
episodes = 4
[[clients]]
name = "cart"
count = 3
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "swapped"
env = "grpo_fed/CartPole-v1"
kwargs = { swap_actions = true }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose last checkpoint is of round 8."""
    folder = tmp_path_factory.mktemp("departures") / "run"
    grpo_fed.run(Scenario.loads(SCENARIO), folder, workers=0)
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_the_client_wired_differently_leaves_the_actor_after_it_has_played(folder: Path):
    clients = [line["clients"]["swapped"] for line in lines_of(folder)]
    left = {number: client["left"] for number, client in enumerate(clients, 1) if "left" in client}
    assert list(left) == [5], "four rounds of evidence, and one to play"
    assert list(left[5]) == ["actor"]
    assert left[5]["actor"] > 0.5
    comparison = clients[4]["comparison"]
    assert comparison["own"] > comparison["shared"]
    assert comparison["episodes"] in range(16, 65, 16)


def test_nobody_else_leaves_anything(folder: Path):
    for line in lines_of(folder):
        assert all(line["clients"][f"cart-{number}"]["fed/personal_groups"] == 0 for number in range(3))


def test_the_client_is_asked_to_come_back_and_stays_out(folder: Path):
    compared = [line["round"] for line in lines_of(folder) if "comparison" in line["clients"]["swapped"]]
    assert compared == [5, 8]
    assert "returned" not in lines_of(folder)[-1]["clients"]["swapped"]


def test_the_episodes_played_are_counted(folder: Path):
    lines = lines_of(folder)
    played = [
        client["comparison"]["episodes"]
        for line in lines
        for client in line["clients"].values()
        if "comparison" in client
    ]
    assert sum(line.get("fed/comparison_episodes", 0) for line in lines) == sum(played)
    assert json.loads((folder / "results.json").read_text())["comparison_episodes"] == sum(played)


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
def test_a_run_that_stops_in_the_middle_of_the_evidence_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path, stop: int
):
    """Before anything is known, when a client was asked, when it has answered, and when it was asked to come back."""

    def interrupt(record: RoundRecord) -> None:
        if record.round == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo_fed.run(Scenario.loads(SCENARIO), tmp_path / "run", watch=interrupt, workers=0)
    resume(tmp_path / "run")
    assert list(without_times(tmp_path / "run")) == list(without_times(folder))
    name = "checkpoints/round-0008/shared.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def without_times(folder: Path) -> Iterator[dict[str, Any]]:
    for line in lines_of(folder):
        clients = {
            name: {key: value for key, value in client.items() if "seconds" not in key}
            for name, client in line["clients"].items()
        }
        yield {
            **{
                key: value
                for key, value in line.items()
                if "/SPS" not in key and "seconds" not in key and "time/" not in key
            },
            "clients": clients,
        }


def test_by_evidence_alone_the_client_leaves_in_the_fourth_round_and_nobody_plays():
    records: list[RoundRecord] = []
    changes = ["merge.confirm=evidence", "merge.rejoin=0", "rounds=5"]
    grpo_fed.run(Scenario.loads(SCENARIO, overrides=changes), watch=records.append, workers=0)
    left = [
        (record.round, client.client, list(client.left))
        for record in records
        for client in record.clients
        if client.left
    ]
    assert left == [(4, "swapped", ["actor"])]
    assert not any(client.comparison for record in records for client in record.clients)


def test_clients_all_alike_leave_nothing_at_ten_times_the_rate_of_one():
    text = SCENARIO.replace("kwargs = { swap_actions = true }", "learning_rate = 1e-1")
    records: list[RoundRecord] = []
    grpo_fed.run(Scenario.loads(text, overrides=["objective.learning_rate=2.5e-3"]), watch=records.append, workers=0)
    departed = {client.client for record in records for client in record.clients if client.departed}
    assert departed <= {"swapped"}, "the fast client may leave; no other"


def test_a_client_whose_task_changes_leaves_within_five_rounds_of_the_change():
    text = (
        SCENARIO.replace(
            "kwargs = { swap_actions = true }", "changes = [{ round = 14, kwargs = { swap_actions = true } }]"
        )
        .replace("rounds = 8", "rounds = 19")
        .replace("steps = 1024", "steps = 2048")
    )
    records: list[RoundRecord] = []
    grpo_fed.run(Scenario.loads(text, overrides=["objective.learning_rate=5e-3"]), watch=records.append, workers=0)
    left = [(record.round, client.client) for record in records for client in record.clients if client.left]
    assert left == [(18, "swapped")]
