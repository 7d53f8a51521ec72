from __future__ import annotations

import pytest
import torch

from grpo_fed.policy.shared import (
    resolve_client_shared_blocks,
    resolve_shared_blocks,
    resolve_shared_blocks_from_shapes,
)
from grpo_fed.rl.make import make_learners
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

DIFFERENT_TASKS = """
name = "different"
steps = 64
[policy]
hidden = [4]
{policy}
[rollout]
num_envs = 4
horizon = 16
[objective]
minibatches = 1
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "bot"
env = "grpo_fed/Acrobot-v1"
"""


def scenario_with(policy: str) -> Scenario:
    return Scenario.loads(DIFFERENT_TASKS.format(policy=policy))


def test_shared_blocks_are_one_vector_of_their_own():
    scenario = scenario_with('adapter = 3\nshared = ["torso.*"]')
    shared_blocks = resolve_shared_blocks(scenario)
    assert shared_blocks.clients == ("cart", "bot")
    assert shared_blocks.blocks == ("torso.0",)
    assert shared_blocks.size == 4 * 3 + 4
    assert shared_blocks.groups.names == ("torso.0",)
    for learner in make_learners(scenario):
        columns = shared_blocks.columns_in(learner.policy.layout)
        torch.testing.assert_close(learner.parameters[0][columns], shared_blocks.initial, rtol=0, atol=0)
        names = {slot.name for slot in learner.policy.layout.slots if slot.start in columns}
        assert names == {"torso.0.weight", "torso.0.bias"}
        learner.close()


def test_a_block_shared_by_name_has_the_same_shapes_everywhere():
    with pytest.raises(ValueError, match=r"block torso\.0, of shapes .* for client cart but shapes .* for client bot"):
        resolve_shared_blocks(scenario_with(""))
    with pytest.raises(ValueError, match=r"block actor, of shapes .*: leave it out, or set policy\.adapter"):
        resolve_shared_blocks(scenario_with('adapter = 3\nshared = ["torso.*", "actor"]'))


def test_a_star_shares_blocks_with_the_same_shapes():
    assert resolve_shared_blocks(scenario_with('adapter = 3\nshared = ["*"]')).blocks == ("torso.0",)
    assert resolve_shared_blocks(scenario_with('shared = ["*"]')).blocks == ()


def test_the_names_say_which_block_each_group_lies_in():
    shared_blocks = resolve_shared_blocks(
        scenario_with('adapter = 3\nshared = ["torso.*"]\ngroups = { "*" = "tensor" }')
    )
    assert shared_blocks.names.blocks == shared_blocks.blocks == ("torso.0",)
    assert shared_blocks.names.groups == shared_blocks.groups.names
    assert shared_blocks.names.block_of_group == {"torso.0.weight": "torso.0", "torso.0.bias": "torso.0"}


def test_no_shared_block_gives_an_empty_vector():
    shared_blocks = resolve_shared_blocks(scenario_with("shared = []"))
    assert (shared_blocks.size, shared_blocks.blocks, shared_blocks.groups.names) == (0, (), ())
    assert shared_blocks.initial.shape == (0,)
    assert shared_blocks.columns_of_groups([]).shape == (0,)


def test_columns_of_groups_are_their_parameters():
    shared_blocks = resolve_shared_blocks(
        scenario_with('adapter = 3\nshared = ["torso.*"]\ngroups = { "torso.*" = "row" }')
    )
    assert shared_blocks.groups.names == tuple(f"torso.0.weight:rows[{row}]" for row in range(4))
    chosen = shared_blocks.columns_of_groups([1, 3])
    weight, bias = chosen[:12].view(4, 3), chosen[12:]
    assert weight.all(1).tolist() == [False, True, False, True]
    assert bias.tolist() == [False, True, False, True]
    assert not shared_blocks.columns_of_groups([]).any()


@pytest.mark.parametrize(
    "policy",
    [
        'adapter = 3\nshared = ["torso.*"]\ngroups = { "torso.*" = "row" }',
        'adapter = 3\nshared = ["*"]',
        'shared = ["*"]',
        "shared = []",
    ],
)
def test_tasks_shapes_and_block_names_give_the_same_shared_blocks(policy: str):
    scenario = scenario_with(policy)
    tasks, shared_blocks = resolve_tasks(scenario), resolve_shared_blocks(scenario)
    from_shapes = resolve_shared_blocks_from_shapes(scenario, {task.client: task.shape for task in tasks})
    assert from_shapes.digest == shared_blocks.digest
    assert from_shapes.max_episode_steps == shared_blocks.max_episode_steps == 500
    torch.testing.assert_close(from_shapes.initial, shared_blocks.initial, rtol=0, atol=0)
    for task in tasks:
        of_client = resolve_client_shared_blocks(scenario, task, shared_blocks.blocks)
        assert of_client.digest == shared_blocks.digest
        assert of_client.clients == shared_blocks.clients == ("cart", "bot")


def test_an_error_about_task_shapes_names_the_clients():
    shapes = {task.client: task.shape for task in resolve_tasks(scenario_with("shared = []"))}
    with pytest.raises(ValueError, match=r"block torso\.0, of shapes .* for client cart but shapes .* for client bot"):
        resolve_shared_blocks_from_shapes(scenario_with(""), shapes)


def test_a_client_without_a_shared_block_is_refused():
    scenario = scenario_with('adapter = 3\nshared = ["torso.*"]')
    with pytest.raises(ValueError, match=r'client bot .*: the server shares \["actor"\], which this client does not'):
        resolve_client_shared_blocks(scenario, resolve_tasks(scenario)[1], ["torso.0", "actor"])


def test_other_groups_or_blocks_have_another_digest():
    policies = (
        'adapter = 3\nshared = ["torso.*"]',
        'adapter = 3\nshared = ["torso.*"]\ngroups = { "torso.*" = "row" }',
        'adapter = 3\nshared = ["torso.*"]\ngroups = { "torso.*" = "column" }',
        'adapter = 4\nshared = ["torso.*"]',
        "shared = []",
    )
    assert len({resolve_shared_blocks(scenario_with(policy)).digest for policy in policies}) == len(policies)
