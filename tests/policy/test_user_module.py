"""A user's own module: observations in their own shape, and clients one by one where they cannot be stacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gymnasium import Space, spaces
from gymnasium.spaces.utils import flatdim, flatten
from torch import Tensor, nn

from grpo_fed.policy.distributions import Categorical
from grpo_fed.policy.own_shapes import unflatten_observations
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.policy.user_module import UserModulePolicy
from grpo_fed.reports.overview import _sizes
from grpo_fed.rl.make import make_learners
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import PolicySettings
from tests.policy.test_policy import autograd_gradient, pull_back, random_parameters

PARTS = spaces.Dict(
    {
        "image": spaces.Box(-1, 1, (2, 3)),
        "mode": spaces.Discrete(4),
        "pair": spaces.Tuple((spaces.Box(-1, 1, ()), spaces.MultiBinary(2))),
    }
)


class Parts(nn.Module):
    """Reads parts of observations by name; `mode` chooses by a branch, which vmap cannot stack."""

    def __init__(self, observation_space: Space[Any], action_space: Space[Any], branches: bool = False) -> None:
        super().__init__()
        self.image, self.rest = nn.Conv1d(2, 3, 2), nn.Linear(4 + 1 + 2, 3)
        self.actor, self.critic = nn.Linear(3, 3), nn.Linear(3, 1)
        self.branches = branches

    def forward(self, observations: dict[str, Any]) -> tuple[Tensor, Tensor]:
        number, flags = observations["pair"]
        rest = self.rest(torch.cat([observations["mode"], number[:, None], flags], -1))
        hidden = torch.tanh(self.image(observations["image"]).mean(-1) + rest)
        if self.branches and hidden.sum() > 0:
            hidden = hidden * 2
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def parts_policy(**kwargs: Any) -> UserModulePolicy:
    settings = PolicySettings(module="a:B", kwargs=kwargs, shared=["rest"])
    return UserModulePolicy(Parts, (PARTS, spaces.Discrete(3)), flatdim(PARTS), Categorical(3), settings)


def test_flat_observations_become_what_the_environment_returned() -> None:
    PARTS.seed(1)
    samples = [PARTS.sample() for _ in range(5)]
    flat = torch.stack([torch.from_numpy(flatten(PARTS, sample)) for sample in samples]).float()
    shaped: Any = unflatten_observations(PARTS, flat[None])
    for index, sample in enumerate(samples):
        assert torch.equal(shaped["image"][0, index], torch.from_numpy(sample["image"]))
        assert shaped["mode"][0, index].argmax() == sample["mode"]
        assert shaped["pair"][0][0, index] == float(sample["pair"][0])
        assert torch.equal(shaped["pair"][1][0, index], torch.from_numpy(sample["pair"][1]).float())


@pytest.mark.parametrize("branches", [False, True])
def test_clients_equal_single_modules_stacked_or_one_by_one(branches: bool) -> None:
    policy = parts_policy(branches=branches)
    assert bool(policy.not_stacked) == branches
    flat, observations = random_parameters(policy, 3), torch.randn(3, 4, flatdim(PARTS))
    output, pullback = policy.vjp(policy.layout.views(flat), observations)
    for client, state in enumerate(policy.layout.unstack(flat)):
        net = Parts(PARTS, spaces.Discrete(3), branches)
        net.load_state_dict(state)
        shaped: Any = unflatten_observations(PARTS, observations[client])
        with torch.no_grad():
            logits, values = net(shaped)
        torch.testing.assert_close(output.distribution[client], logits)
        torch.testing.assert_close(output.values[client], values)
    by = torch.randn(3, 4, 3), torch.randn(3, 4)
    expected = autograd_gradient(policy, flat, observations, by)
    torch.testing.assert_close(pull_back(policy, pullback, by, 3), expected, rtol=1e-4, atol=1e-6)


class Pixels(nn.Module):
    """A network for pictures of the user's own, which branches on what it sees."""

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Discrete) -> None:
        super().__init__()
        assert observation_space.shape == (2, 42, 42)
        self.conv, self.actor, self.critic = nn.Conv2d(2, 4, 8, 8), nn.Linear(100, 3), nn.Linear(100, 1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        assert observations.shape[1:] == (2, 42, 42)
        scaled = observations / 255 if observations.max() > 1 else observations
        features = self.conv(scaled).relu().flatten(1)
        return self.actor(features), self.critic(features).squeeze(-1)


PIXELS = f"""
name = "pixels"
steps = 16
policy = {{ module = "{__name__}:Pixels", shared = ["conv"] }}
rollout = {{ num_envs = 2, horizon = 8 }}
objective = {{ epochs = 1, minibatches = 1 }}
clients = [{{ name = "catch", env = "grpo_fed/Catch-v0", count = 2 }}]
"""


def test_a_module_that_cannot_be_stacked_learns_and_check_says_so() -> None:
    scenario = Scenario.loads(PIXELS)
    (learner,) = make_learners(scenario)
    before = learner.parameters.clone()
    learner.train(16)
    assert ((learner.parameters - before).abs().amax(1) > 0).all()
    text = _sizes(learner, resolve_shared_blocks(scenario))
    assert "Categorical; clients are computed one by one, as torch.func cannot stack the module (" in text
    learner.close()
