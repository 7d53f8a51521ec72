from __future__ import annotations

import pytest
import torch

from grpo_fed.policy.shared import (
    resolve_client_shared_blocks,
    resolve_shared_blocks,
    resolve_shared_blocks_from_shapes,
)
from grpo_fed.rl.stacked_learner import make_learners
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

UNLIKE = """
name = "unlike"
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


def unlike(policy: str) -> Scenario:
    return Scenario.loads(UNLIKE.format(policy=policy))


def test_the_shared_blocks_are_one_vector_of_their_own():
    scenario = unlike('adapter = 3\nshared = ["torso.*"]')
    commons = resolve_shared_blocks(scenario)
    assert commons.clients == ("cart", "bot")
    assert commons.blocks == ("torso.0",)
    assert commons.size == 4 * 3 + 4
    assert commons.groups.names == ("torso.0",)
    for fleet in make_learners(scenario):
        columns = commons.columns_in(fleet.policy.layout)
        torch.testing.assert_close(fleet.parameters[0][columns], commons.initial, rtol=0, atol=0)
        names = {slot.name for slot in fleet.policy.layout.slots if slot.start in columns}
        assert names == {"torso.0.weight", "torso.0.bias"}
        fleet.close()


def test_a_block_shared_by_name_must_be_alike():
    with pytest.raises(ValueError, match=r"block torso\.0, of shapes .* for client cart but shapes .* for client bot"):
        resolve_shared_blocks(unlike(""))
    with pytest.raises(ValueError, match=r"block actor, of shapes .*: leave it out, or set policy\.adapter"):
        resolve_shared_blocks(unlike('adapter = 3\nshared = ["torso.*", "actor"]'))


def test_a_star_shares_what_is_alike():
    assert resolve_shared_blocks(unlike('adapter = 3\nshared = ["*"]')).blocks == ("torso.0",)
    assert resolve_shared_blocks(unlike('shared = ["*"]')).blocks == ()


def test_nothing_shared_is_a_vector_of_no_entries():
    commons = resolve_shared_blocks(unlike("shared = []"))
    assert (commons.size, commons.blocks, commons.groups.names) == (0, (), ())
    assert commons.initial.shape == (0,)
    assert commons.columns_of_groups([]).shape == (0,)


def test_what_a_client_keeps_is_the_columns_of_its_groups():
    commons = resolve_shared_blocks(unlike('adapter = 3\nshared = ["torso.*"]\ngroups = { "torso.*" = "row" }'))
    assert commons.groups.names == tuple(f"torso.0.weight:rows[{row}]" for row in range(4))
    kept = commons.columns_of_groups([1, 3])
    weight, bias = kept[:12].view(4, 3), kept[12:]
    assert weight.all(1).tolist() == [False, True, False, True]
    assert bias.tolist() == [False, True, False, True]
    assert not commons.columns_of_groups([]).any()


@pytest.mark.parametrize(
    "policy",
    [
        'adapter = 3\nshared = ["torso.*"]\ngroups = { "torso.*" = "row" }',
        'adapter = 3\nshared = ["*"]',
        'shared = ["*"]',
        "shared = []",
    ],
)
def test_the_tasks_forms_and_a_client_that_is_told_the_blocks_come_to_the_same(policy: str):
    scenario = unlike(policy)
    tasks, commons = resolve_tasks(scenario), resolve_shared_blocks(scenario)
    from_forms = resolve_shared_blocks_from_shapes(scenario, {task.client: task.shape for task in tasks})
    assert from_forms.digest == commons.digest
    assert from_forms.max_episode_steps == commons.max_episode_steps == 500
    torch.testing.assert_close(from_forms.initial, commons.initial, rtol=0, atol=0)
    for task in tasks:
        own = resolve_client_shared_blocks(scenario, task, commons.blocks)
        assert own.digest == commons.digest
        assert own.clients == commons.clients == ("cart", "bot")


def test_forms_that_share_no_shape_are_told_apart_by_their_clients():
    forms = {task.client: task.shape for task in resolve_tasks(unlike("shared = []"))}
    with pytest.raises(ValueError, match=r"block torso\.0, of shapes .* for client cart but shapes .* for client bot"):
        resolve_shared_blocks_from_shapes(unlike(""), forms)


def test_a_client_without_a_block_that_the_server_shares_says_so():
    scenario = unlike('adapter = 3\nshared = ["torso.*"]')
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
    assert len({resolve_shared_blocks(unlike(policy)).digest for policy in policies}) == len(policies)
