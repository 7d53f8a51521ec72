"""Costs of steps: read from infos, whatever steps the environments, and those of our point mass by hand."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from grpo_fed.tasks.envs import make_client_envs
from grpo_fed.tasks.envs.base import read_cost
from grpo_fed.tasks.families import FamilyVectorEnv
from grpo_fed.tasks.task import TaskError
from tests.support.toy_envs import counting_task, make_task, make_tasks, roll_out, sample_actions, sample_streams

TOYS = ["Counter", *(mode.value for mode in AutoresetMode)]


@pytest.mark.parametrize("env", TOYS)
@pytest.mark.parametrize("restart", [True, False])
def test_a_valid_step_costs_what_its_info_says(env: str, restart: bool):
    """Step n of an episode of three is rewarded with n and costs n / 2; the last step's info too."""
    task = make_task(f"toys/{env}-v0")
    envs = make_client_envs([task], 2, cost_key="toll")
    envs.reset(sample_streams(2))
    steps = [envs.step(row, restart) for row in sample_actions(task, 8, 2)]
    envs.close()
    assert sum(step.valid.sum() for step in steps) >= 6
    for step in steps:
        np.testing.assert_array_equal(step.costs, step.rewards / 2)


def test_no_cost_is_read_without_a_key():
    _, steps = roll_out(
        make_client_envs([counting_task()], 2), sample_actions(counting_task(), 2, 2), sample_streams(2)
    )
    assert [step.costs for step in steps] == [None, None]


@pytest.mark.parametrize("env", TOYS)
def test_a_missing_cost_names_the_client_the_key_and_what_there_is(env: str):
    task = make_task(f"toys/{env}-v0")
    envs = make_client_envs([task], 2, cost_key="price")
    envs.reset(sample_streams(2))
    with pytest.raises(TaskError, match=r"toy: .*objective.cost.key = 'price': .* it has map, toll; set the key"):
        envs.step(sample_actions(task, 1, 2)[0])
    envs.close()


def test_a_cost_is_one_number():
    assert read_cost({"cost": np.float32(0.5)}, "cost") == 0.5
    assert read_cost({"cost": np.True_}, "cost") == 1.0
    for value in ("much", [1.0], None, np.ones(2)):
        with pytest.raises(ValueError, match="a cost must be a number"):
            read_cost({"cost": value}, "cost")


def test_clients_that_are_stepped_in_several_ways_have_their_costs_in_order():
    tasks = make_tasks(
        {"name": "point", "env": "grpo_fed/PointMass-v0", "kwargs": {"hazard": [0, 0], "hazard_radius": 1.0}},
        {"name": "single", "env": "grpo_fed/PointMass-v0", "wrappers": ["grpo_fed.tasks.wrappers:NegatedReward"]},
    )
    envs = make_client_envs(tasks, 2, cost_key="cost")
    _, steps = roll_out(envs, sample_actions(tasks[0], 3, 4), sample_streams(4))
    for step in steps:
        assert step.costs is not None
        assert step.costs.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("env", ["CartPole-v1", "grpo_fed/CartPole-v1"])
def test_a_scenario_with_a_limit_is_refused_where_an_environment_reports_no_cost(env: str):
    limit = {"objective": {"cost": {"limit": 1.0}}}
    with pytest.raises(ValueError, match=r"client cart: .*objective.cost.key = 'cost': .* it is empty; set the key"):
        make_tasks({"name": "cart", "env": env}, **limit)
    for env in ("toys/NextStep-v0", "toys/Counter-v0"):
        with pytest.raises(ValueError, match="it has map, toll"):
            make_tasks({"name": "cart", "env": env}, **limit)
        make_tasks({"name": "cart", "env": env}, objective={"cost": {"limit": 1.0, "key": "toll"}})


# The point mass ------------------------------------------------------------------------------------------------------


def test_a_step_into_the_hazard_costs_one():
    """From rest a full push to the right moves by 0.01 in the first step and 0.0199 in the second (drag 0.1)."""
    env = FamilyVectorEnv("grpo_fed/PointMass-v0", 3, hazard=[[0.1, 0.0]] * 3, hazard_radius=[0.085, 0.08, 0.0])
    env.reset(seed=0)
    env.state = np.zeros((3, 4))
    push = np.tile(np.float32([1, 0]), (3, 1))
    costs = []
    for _ in range(2):
        *_, infos = env.step(push)
        assert infos["_cost"].all()
        costs.append(infos["cost"].tolist())
    np.testing.assert_allclose(env.state[:, 0], 0.01 + 0.0199)
    # distances to the centre are 0.09 and 0.0701
    assert costs == [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def test_a_copy_whose_episode_has_ended_costs_nothing():
    env = FamilyVectorEnv(
        "grpo_fed/PointMass-v0", 2, goal=[[0, 0], [1, 1]], hazard=(0, 0), hazard_radius=1.0, radius=0.2
    )
    env.reset(seed=0)
    still = np.zeros((2, 2), np.float32)
    *_, infos = env.step(still)
    assert infos["cost"].tolist() == [1.0, 1.0]
    *_, infos = env.step(still)
    assert (infos["cost"].tolist(), infos["_cost"].tolist()) == ([0.0, 1.0], [False, True])


def test_a_single_point_mass_has_the_cost_in_its_info():
    env = gymnasium.make("grpo_fed/PointMass-v0", hazard=(0, 0), hazard_radius=0.5)
    env.reset(seed=0)
    assert env.step(np.zeros(2, np.float32))[-1] == {"cost": 1.0}
