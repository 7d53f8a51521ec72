"""Every scenario that ships runs, for a round; and four unlike tasks share what can be shared."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_fed import Scenario, run
from grpo_fed.scenario.shipped import find_scenario, shipped_scenarios

NEEDS = {"lunar": "Box2D", "cheetah": "mujoco", "metaworld": "metaworld"}
PARTS = {"adapter", "torso", "actor", "critic", "log_std"}
LESS = {
    "lunar": ["steps=2048", "rollout.horizon=128", "objective.minibatches=8"],
    "thousand": ["clients.cart.count=30"],
}


@pytest.mark.parametrize("name", [one.name for one in shipped_scenarios()])
def test_every_scenario_that_ships_runs_a_round(name: str):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs an extra that is not installed")
    overrides = ["rounds=1", "evaluate.episodes=1", "evaluate.step_limit=200", *LESS.get(name, [])]
    result = run(Scenario.load(find_scenario(name), overrides), workers=0)
    assert result.status == "finished"
    assert result.env_steps > 0
    assert not result.missing
    assert all(client.after is not None for client in result.clients.values())


def test_unlike_tasks_share_a_torso_and_keep_the_rest(tmp_path: Path):
    overrides = ["rounds=2", "evaluate.episodes=1", "evaluate.step_limit=200", "proximity.mode=off", "merge.rule=mean"]
    result = run(Scenario.load(find_scenario("mixed-control"), overrides), tmp_path, workers=0)
    learned = {name: saved(tmp_path, name) for name in result.clients}
    shapes = {name: parameters["adapter.weight"].shape for name, parameters in learned.items()}
    assert shapes == {"cartpole": (16, 4), "acrobot": (16, 6), "mountain-car": (16, 2), "pendulum": (16, 3)}
    for one, other in itertools.combinations(learned.values(), 2):
        for name in one:
            if name.startswith("torso."):
                torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
            elif one[name].shape == other[name].shape and name.endswith("weight"):
                assert not torch.equal(one[name], other[name]), f"{name} is private"
    first = Scenario.load(find_scenario("mixed-control"), [*overrides, "rounds=1"])
    before = run(first, tmp_path / "first", workers=0)
    assert before.status == "finished"
    earlier = saved(tmp_path / "first", "pendulum")
    assert not torch.equal(earlier["torso.1.weight"], learned["pendulum"]["torso.1.weight"])


def saved(folder: Path, client: str) -> dict[str, torch.Tensor]:
    """Its parameters by name."""
    arrays = load_file(folder / "policies" / f"{client}.safetensors")
    return {name: array for name, array in arrays.items() if name.split(".")[0] in PARTS}
