"""What the benchmark of stable-baselines3 in a federation counts, and the clients that it makes."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np

from benchmarks.sb3_federated import BLOCKS, Outcome, Sb3Run, format_table, make_learner, read_run
from grpo_fed.adapters import ClientInfo
from grpo_fed.adapters.learner import module_arrays
from grpo_fed.flower.array_blocks import cut_array_blocks

RUNS = [
    Sb3Run(
        "sb3 grouped",
        800,
        Outcome(
            [100.0, 200, 300, 400, 500, 500],
            {"4": [(4, "actor")], "5": [(6, "actor")]},
            {"4": ["actor"], "5": ["actor"]},
            0.01,
        ),
        30.0,
    ),
    Sb3Run(
        "sb3 grouped",
        801,
        Outcome(
            [100.0, 200, 300, 400, 9, 9],
            {"4": [(5, "torso.1")], "0": [(9, "actor")]},
            {"4": ["torso.1"], "0": ["actor"]},
            0.02,
        ),
        50.0,
    ),
    Sb3Run("sb3 fedavg", 800, Outcome([500.0] * 6, {}, {}, None), 10.0),
]


def test_found_are_backward_clients_that_are_out_of_the_actor_alone():
    grouped, fedavg = list(format_table(RUNS))[2:]
    cells = grouped.strip("| ").split(" | ")
    assert cells[0] == "sb3 grouped"
    assert cells[1].startswith("250 [")  # the middle four of eight: 200, 200, 300 and 300
    assert cells[1].endswith(", 100 to 400")
    assert cells[2].endswith(", 9 to 500")
    assert cells[3:] == ["2 of 4", "4 to 6", "1 of 8", "0.020", "40", "2"]
    assert fedavg.endswith("|  |  |  |  | 10 | 1 |")


def test_a_line_of_the_results_is_read_as_it_was_written():
    line = json.loads(json.dumps(asdict(RUNS[0])))
    assert asdict(read_run(line)) == {**asdict(RUNS[0]), "outcome": line["outcome"]}


def test_the_blocks_are_those_of_the_scenario_and_the_critic_is_in_none():
    arrays = module_arrays(make_learner(800, ClientInfo("client-4", 4, round=1)).module)
    shared = cut_array_blocks(arrays, BLOCKS, [list(BLOCKS)])
    assert shared.blocks == ("torso.0", "torso.1", "actor")
    assert {name for name in arrays if name not in {slot.name for slot in shared.layout.slots}} == {
        *(f"mlp_extractor.value_net.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
        "value_net.weight",
        "value_net.bias",
    }
    assert np.isfinite(shared.initial.numpy()).all()
