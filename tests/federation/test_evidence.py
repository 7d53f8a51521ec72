"""What a round's record, its line and the results say of the merge rule `persistence`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fed.aggregation.merge.conflicts import PAYS
from grpo_fed.aggregation.merge.evidence import LEAST_EVIDENCE
from grpo_fed.aggregation.merge.persistence import MIN_ROUNDS, rounds_of_evidence
from grpo_fed.federation.messages import Train
from grpo_fed.federation.round_record import MOST_RHO
from grpo_fed.federation.rounds import Federation
from grpo_fed.runs.departures import Departure
from grpo_fed.runs.history import read_history
from grpo_fed.runs.results import Result
from tests.support.numeric_clients import NumericTransport, numeric_federation

LEAVES = rounds_of_evidence(10)
"""The round in which the contrary client leaves: the actor has 4 weights and a bias for each of 2 actions."""
LAST = LEAVES + 2


EVIDENCE = ('merge.rule="persistence"', 'merge.confirm="evidence"', "merge.rejoin=0")


def federation(folder: Path, *overrides: str) -> tuple[Federation, NumericTransport]:
    """Make a federation of three clients whose actors move one way, and one whose actor moves the opposite way.

    The evidence of updates alone decides, unless the overrides say otherwise.
    """
    scenario, shared_blocks, clients = numeric_federation(*EVIDENCE, f"rounds={LAST}", *overrides)
    near = np.zeros(shared_blocks.size, np.float32)
    there, back = near.copy(), near.copy()
    there[shared_blocks.slices["actor"]], back[shared_blocks.slices["actor"]] = 20.0, -20.0
    clients.goals = {"c-0": there, "c-1": there, "c-2": there, "c-3": back}
    return Federation(scenario, shared_blocks, clients, folder), clients


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_the_line_of_the_round_in_which_a_client_leaves_has_the_groups_and_their_rho(tmp_path: Path):
    federation(tmp_path)[0].run()
    lines = read_lines(tmp_path)
    assert [line["round"] for line in lines if "left" in line["clients"]["c-3"]] == [LEAVES]
    line = lines[LEAVES - 1]["clients"]["c-3"]
    assert line["left"].keys() == {"actor"}
    assert line["left"]["actor"] > PAYS
    assert line["left"]["actor"] == line["rho/actor"] == round(line["rho/actor"], 4)
    assert line["personal_groups"] == ["actor"]
    assert not [name for line in lines for name in ("c-0", "c-1", "c-2") if "left" in line["clients"][name]]


def test_a_line_has_rho_from_the_second_round_on_and_none_of_a_group_that_was_left(tmp_path: Path):
    federation(tmp_path)[0].run()
    lines = read_lines(tmp_path)
    assert [bool([key for key in line if "rho" in key]) for line in lines] == [line["round"] >= 2 for line in lines]
    assert lines[1]["fed/rho_limit"] == PAYS
    greatest = [line.get("rho/actor") for line in lines[LEAVES:]]
    assert greatest == [max(line["clients"][f"c-{k}"]["rho/actor"] for k in range(3)) for line in lines[LEAVES:]]
    assert not [line for line in lines[LEAVES:] if "rho/actor" in line["clients"]["c-3"]]


def test_the_line_has_rho_of_each_group_where_a_block_has_several(tmp_path: Path):
    federation(tmp_path, 'policy.groups={ "actor"="row" }')[0].run()
    client = read_lines(tmp_path)[MIN_ROUNDS - 1]["clients"]["c-0"]
    rows = {f"actor.weight:rows[{row}]" for row in range(2)}
    assert rows <= client["rho_by_group"].keys()
    assert max(client["rho_by_group"][row] for row in rows) == client["rho/actor"]
    assert client["rho_by_group"]["torso.0"] == client["rho/torso.0"]


def test_a_client_leaves_learned_groups_unit_by_unit(tmp_path: Path):
    federation(tmp_path, 'policy.groups={ "*"="learned" }')[0].run()
    lines = read_lines(tmp_path)
    client = lines[MIN_ROUNDS - 1]["clients"]["c-0"]
    assert client["rho_by_group"]["actor.weight:rows[0]"] == client["rho_by_group"]["actor.weight:rows[1]"]
    assert {*lines[LEAVES - 1]["clients"]["c-3"]["left"]} == {f"actor.weight:rows[{row}]" for row in range(2)}


def test_the_line_has_rho_of_blocks_alone_where_there_are_many_groups(tmp_path: Path):
    many = MOST_RHO // 4  # rows of the first layer, for four clients; with the actor they are more than MOST_RHO
    scenario = [f"policy.hidden=[{many}]", 'policy.groups={ "torso.0"="row" }', f"rounds={MIN_ROUNDS}"]
    federation(tmp_path, *scenario)[0].run()
    clients = read_lines(tmp_path)[-1]["clients"]
    assert {"rho/torso.0", "rho/actor"} <= clients["c-0"].keys()
    assert not [client for client in clients.values() if "rho_by_group" in client]
    assert clients["c-3"]["left"]


def test_results_and_history_have_the_round_and_rho_of_each_departure(tmp_path: Path):
    result = federation(tmp_path)[0].run()
    rho = read_lines(tmp_path)[LEAVES - 1]["clients"]["c-3"]["left"]["actor"]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["clients"]["c-3"]["departures"] == {"actor": {"round": LEAVES, "rho": rho}}
    assert "departures" not in document["clients"]["c-0"]
    assert Result.from_json(document).clients["c-3"].departures == {"actor": Departure(LEAVES, rho)}
    assert result.clients["c-3"].departures["actor"].round == LEAVES
    history = read_history(tmp_path)
    assert history.departures == {"c-0": {}, "c-1": {}, "c-2": {}, "c-3": {"actor": Departure(LEAVES, rho)}}


# What clients find by playing -----------------------------------------------------------------------------------------


def test_a_client_in_conflict_is_asked_and_leaves_if_its_own_parameters_are_better(tmp_path: Path):
    made, clients = federation(tmp_path, 'merge.confirm="returns"')
    made.run()
    actor = made.shared_blocks.groups.names.index("actor")
    asked = [(name, train.start.round, train.compare) for name, train in clients.sent_of(Train) if train.compare]
    assert asked == [("c-3", LEAVES + 1, (actor,))]
    lines = read_lines(tmp_path)
    assert [line["round"] for line in lines if "left" in line["clients"]["c-3"]] == [LEAVES + 1]
    line = lines[LEAVES]["clients"]["c-3"]
    assert line["comparison"].keys() == {"own", "shared", "error", "learned", "episodes"}
    assert line["comparison"]["own"] > line["comparison"]["shared"]
    # the conflict was seen in the round before
    assert line["left"] == {"actor": lines[LEAVES - 1]["clients"]["c-3"]["rho/actor"]}
    assert not [line for line in lines if "returned" in line["clients"]["c-3"] or "stayed" in line["clients"]["c-3"]]
    played = {line["round"]: line["fed/comparison_episodes"] for line in lines[1:]}
    assert {number: episodes for number, episodes in played.items() if episodes} == {LEAVES + 1: 2}
    assert json.loads((tmp_path / "results.json").read_text())["comparison_episodes"] == 2


def test_a_client_in_conflict_stays_if_the_shared_parameters_are_no_worse(tmp_path: Path):
    made, clients = federation(tmp_path, 'merge.confirm="returns"', f"rounds={LEAVES + 2 + 2 * MIN_ROUNDS}")
    clients.shares_from = 0
    result = made.run()
    asked = [(name, train.start.round) for name, train in clients.sent_of(Train) if train.compare]
    # The decision in round LEAVES + 1 begins its evidence anew, with that round, and takes twice as much of it.
    again = LEAVES + 1 + 2 * MIN_ROUNDS
    assert asked == [("c-3", LEAVES + 1), ("c-3", again)]
    lines = read_lines(tmp_path)
    assert [line["round"] for line in lines if "stayed" in line["clients"]["c-3"]] == [LEAVES + 1, again]
    assert lines[LEAVES]["clients"]["c-3"]["stayed"] == {"actor": lines[LEAVES - 1]["clients"]["c-3"]["rho/actor"]}
    assert not [line for line in lines if {"left", "personal_groups"} & line["clients"]["c-3"].keys()]
    assert result.clients["c-3"].departures == {}


def test_a_client_that_left_returns_with_the_gain_that_it_saw(tmp_path: Path):
    made, clients = federation(tmp_path, "merge.rejoin=2", f"rounds={LEAVES + 6}")
    clients.shares_from = LEAVES + 5
    result = made.run()
    # It waits for two rounds, is asked with the next instruction, refuses, and is asked two rounds later again.
    asked = [(name, train.start.round) for name, train in clients.sent_of(Train) if train.compare]
    assert asked == [("c-3", LEAVES + 3), ("c-3", LEAVES + 5)]
    lines = read_lines(tmp_path)
    assert [line["round"] for line in lines if "left" in line["clients"]["c-3"]] == [LEAVES]
    assert [line["round"] for line in lines if "returned" in line["clients"]["c-3"]] == [LEAVES + 5]
    line = lines[LEAVES + 4]["clients"]["c-3"]
    gain = line["comparison"]["shared"] - line["comparison"]["own"]
    assert line["returned"] == {"actor": pytest.approx(gain, abs=2e-4)}
    kept = [line["round"] for line in lines if line["clients"]["c-3"].get("personal_groups") == ["actor"]]
    assert kept == list(range(LEAVES, LEAVES + 5))
    assert result.clients["c-3"].departures == {}
    history = read_history(tmp_path)
    moves = [(move.round, move.group, move.left, move.evidence) for move in history.moves]
    assert moves == [
        (LEAVES, "actor", True, lines[LEAVES - 1]["clients"]["c-3"]["left"]["actor"]),
        (LEAVES + 5, "actor", False, line["returned"]["actor"]),
    ]
    assert history.departures["c-3"] == {}


@pytest.mark.parametrize(("parameters", "rounds"), [(1, 21), (2, 15), (33, 5), (34, 4), (5000, 4)])
def test_small_groups_take_more_rounds_of_evidence(parameters: int, rounds: int):
    # 400 pairs of rounds: 21 x 20 x 1, 15 x 14 x 2, 5 x 4 x 33, 4 x 3 x 34; but at least 4 rounds
    assert (LEAST_EVIDENCE, MIN_ROUNDS) == (400, 4)
    assert rounds_of_evidence(parameters) == rounds
