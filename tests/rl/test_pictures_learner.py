"""Learning from pictures: they stay uint8 up to the network, and a client learns as it would alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.batch import make_batch
from grpo_fed.rl.make import make_learners
from grpo_fed.rl.measurement import MeasurementStates, fisher_diagonal, mean_kl
from grpo_fed.rl.minibatches import PackedBatch
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_gym_tasks

PIXELS = """
name = "pixels"
steps = 32
rounds = 2
[policy]
kind = "cnn"
hidden = [8]
torso = "shared"
[rollout]
num_envs = 2
horizon = 16
episode_limit = 7
[objective]
epochs = 2
minibatches = 2
learning_rate = 1e-3
[[clients]]
name = "catch"
env = "grpo_fed/Catch-v0"
count = 3
spread = { fall = [1.0, 4.0] }
"""


def learner_of(*overrides: str) -> StackedLearner:
    (learner,) = make_learners(Scenario.loads(PIXELS, overrides=overrides))
    assert isinstance(learner, StackedLearner)
    return learner


def test_pictures_stay_uint8_up_to_the_network() -> None:
    learner = learner_of()
    trajectories, _ = learner.collect(np.ones(3, bool))
    assert trajectories.cuts, "episodes are cut after 7 steps"
    pictures = [trajectories.observations, trajectories.last, *(cut.observation for cut in trajectories.cuts)]
    stack = learner.stacks[0]
    batch = make_batch(learner.policy, stack.views, trajectories, stack.rows, critic=True)
    assert {array.dtype for array in pictures} == {np.dtype(np.uint8)}
    assert batch.observations.dtype == torch.uint8
    learner.train(32)
    assert learner.measurement_states[0].dtype == np.uint8
    learner.close()


def test_values_at_truncations_are_those_of_the_pictures_there() -> None:
    learner = learner_of()
    trajectories, _ = learner.collect(np.ones(3, bool))
    stack = learner.stacks[0]
    batch = make_batch(learner.policy, stack.views, trajectories, stack.rows, critic=True)
    cut = trajectories.cuts[0]
    picture = torch.from_numpy(cut.observation)[None, None].expand(3, 1, -1)
    expected = learner.policy.forward(stack.views, picture).values[cut.client, 0]
    torch.testing.assert_close(batch.next_values[cut.client, cut.t, cut.copy], expected)
    learner.close()


@pytest.mark.parametrize("valid", [True, False])
def test_minibatches_keep_pictures_beside_their_numbers(valid: bool) -> None:
    """Every step's picture has the colour 10 client + step, and so has its action."""
    learner = learner_of()
    trajectories, _ = learner.collect(np.ones(3, bool))
    stack = learner.stacks[0]
    batch = make_batch(learner.policy, stack.views, trajectories, stack.rows, critic=True)
    colours = torch.arange(3)[:, None] * 40 + torch.arange(32)
    batch = replace(
        batch,
        observations=colours.view(3, 16, 2, 1).expand(-1, -1, -1, 5).to(torch.uint8),
        actions=colours.view(3, 16, 2, 1).float(),
        valid=batch.valid if valid else colours.view(3, 16, 2) % 5 > 0,
    )
    targets = LearningTargets(batch.rewards, batch.rewards, torch.ones_like(batch.rewards))
    packed = PackedBatch.of(batch, targets, None)
    parts = list(packed.minibatches([1, 2, 3], np.zeros(3, np.int64), 1, 4))
    assert len(parts) == 4
    for part in (*parts, packed.whole):
        assert part.observations.dtype == torch.uint8
        assert torch.equal(part.observations.float(), part.actions.expand(-1, -1, 5))
    seen = torch.cat([part.actions[..., 0] for part in parts], 1)
    weights = torch.cat([part.weights for part in parts], 1)
    assert sorted(seen[1][weights[1] > 0].tolist()) == colours[1][batch.valid[1].flatten()].tolist()
    learner.close()


def test_a_client_learns_the_same_alone_and_beside_others() -> None:
    scenario = Scenario.loads(PIXELS)
    tasks = resolve_gym_tasks(scenario)
    together, alone = StackedLearner(tasks, scenario), StackedLearner(tasks[1:2], scenario)
    together.train(64)
    alone.train(64)
    torch.testing.assert_close(together.parameters[1], alone.parameters[0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(together.parameters[0], together.parameters[1])
    together.close()
    alone.close()


def test_a_client_goes_on_from_its_state_bit_for_bit() -> None:
    first, second = learner_of(), learner_of()
    first.train(32)
    second.load([first.state(row) for row in range(3)])
    first.train(32)
    second.train(32)
    assert torch.equal(first.parameters, second.parameters)
    first.close()
    second.close()


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.preset=trpo", "trust.cg_iterations=2"],
        ["objective.preset=grpo", "group.size=2", "normalise.rewards=true"],
        ["normalise.observations=true", "policy.encoder=impala", "clients.0.count=1", "clients.0.spread={}"],
    ],
    ids=["natural", "group", "normalised"],
)
def test_every_kind_of_update_learns_from_pictures(overrides: list[str]) -> None:
    learner = learner_of(*overrides)
    before = learner.parameters.clone()
    learner.train(32)
    assert not torch.equal(before, learner.parameters)
    assert learner.parameters.isfinite().all()
    learner.close()


def test_kl_and_fisher_are_measured_on_pictures() -> None:
    """The Fisher diagonal is the mean of the squared gradients of single pictures, here one by one by autograd."""
    learner = learner_of("clients.0.count=1", "clients.0.spread={}")
    policy, flat = learner.policy, learner.parameters
    pictures = np.random.default_rng(0).integers(0, 256, (2, policy.observation_size), np.uint8)
    states = MeasurementStates.of([pictures], torch.device("cpu"))
    assert states.observations.dtype == torch.uint8
    assert mean_kl(policy, states, flat, [flat])[0, 0] == 0
    noise = torch.from_numpy(policy.distribution.draw_noise(generator(7, Purpose.FISHER, 1), (2,)))
    expected = torch.zeros_like(flat)
    for picture, draw in zip(torch.from_numpy(pictures), noise, strict=True):
        leaf = flat.clone().requires_grad_()
        logits = policy.act(policy.layout.views(leaf), picture[None, None])
        action = policy.distribution.sample(logits.detach(), draw[None, None])
        (gradient,) = torch.autograd.grad(policy.distribution.log_prob(logits, action).sum(), leaf)
        expected += gradient.square() / 2
    actual = fisher_diagonal(policy, states, flat, [7], 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)
    assert expected[0, : policy.layout.blocks[0].stop].any()
    learner.close()
