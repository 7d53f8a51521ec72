"""Every scenario that ships runs for a round, and four different tasks share a torso."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_fed import Scenario, run
from grpo_fed.scenario.importing import import_object
from grpo_fed.scenario.shipped import find_scenario, shipped_scenarios

EXTRAS = {"lunar": "Box2D", "cheetah": "mujoco", "metaworld": "metaworld"}
BLOCKS = {"adapter", "torso", "actor", "critic", "log_std"}
MODELS = ("reasoning", "smollm")
SMALLER = {
    "lunar": ["steps=2048", "rollout.horizon=128", "objective.minibatches=8"],
    "catch": ["steps=128", "rollout.num_envs=2", "rollout.episode_limit=40"],
    "newcomers": ["evaluate.adapt=2"],
    "thousand": ["clients.cart.count=30"],
    "private": ["clients.cart.count=30"],
}


@pytest.mark.parametrize("name", [shipped.name for shipped in shipped_scenarios()])
def test_every_scenario_that_ships_runs_a_round(name: str):
    if name in MODELS:
        pytest.skip(f"{name} needs the files of a language model")
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"{name} needs an extra that is not installed")
    overrides = ["rounds=1", "evaluate.episodes=1", "evaluate.step_limit=200", *SMALLER.get(name, [])]
    result = run(Scenario.load(find_scenario(name), overrides), workers=0)
    assert result.status == "finished"
    assert result.env_steps > 0
    assert not result.missing
    assert all(client.after is not None for client in result.clients.values())


@pytest.mark.parametrize("name", [shipped.name for shipped in shipped_scenarios()])
def test_every_wrapper_of_a_scenario_that_ships_can_be_imported(name: str):
    scenario = Scenario.load(find_scenario(name))
    for wrapper in (wrapper for client in scenario.clients for wrapper in client.wrappers):
        assert callable(import_object(wrapper if isinstance(wrapper, str) else wrapper.path))


def test_different_tasks_share_the_torso_and_nothing_else(tmp_path: Path):
    overrides = ["rounds=2", "evaluate.episodes=1", "evaluate.step_limit=200", "proximity.mode=off", "merge.rule=mean"]
    result = run(Scenario.load(find_scenario("mixed-control"), overrides), tmp_path, workers=0)
    policies = {name: load_parameters(tmp_path, name) for name in result.clients}
    shapes = {name: parameters["adapter.weight"].shape for name, parameters in policies.items()}
    assert shapes == {"cartpole": (16, 4), "acrobot": (16, 6), "mountain-car": (16, 2), "pendulum": (16, 3)}
    for first, second in itertools.combinations(policies.values(), 2):
        for name in first:
            if name.startswith("torso."):
                torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            elif first[name].shape == second[name].shape and name.endswith("weight"):
                assert not torch.equal(first[name], second[name]), f"{name} is private"
    one_round = Scenario.load(find_scenario("mixed-control"), [*overrides, "rounds=1"])
    result = run(one_round, tmp_path / "one-round", workers=0)
    assert result.status == "finished"
    after_one_round = load_parameters(tmp_path / "one-round", "pendulum")
    assert not torch.equal(after_one_round["torso.1.weight"], policies["pendulum"]["torso.1.weight"])


def load_parameters(folder: Path, client: str) -> dict[str, torch.Tensor]:
    """Load a client's parameters by name."""
    arrays = load_file(folder / "policies" / f"{client}.safetensors")
    return {name: array for name, array in arrays.items() if name.split(".")[0] in BLOCKS}
