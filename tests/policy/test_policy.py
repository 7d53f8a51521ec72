"""Policies: their gradients against autograd, stacked against single networks, and a user's own module."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.base import Parameters, Policy, Pullback, StackedPolicy
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import (
    Categorical,
    Distribution,
    Gaussian,
    Hybrid,
    MultiCategorical,
    SquashedGaussian,
)
from grpo_fed.policy.user_module import UserModulePolicy
from grpo_fed.rl.measurement import MeasurementStates, mean_kl
from grpo_fed.scenario.settings import PolicySettings

DISTRIBUTIONS: list[Distribution] = [
    *(Categorical(3), MultiCategorical((2, 4)), Gaussian(2), SquashedGaussian(2)),
    Hybrid(MultiCategorical((2, 3)), Gaussian(2)),
]
SETTINGS = [
    PolicySettings(hidden=[8, 6]),
    PolicySettings(hidden=[8], torso="shared", activation="relu"),
    PolicySettings(hidden=[7, 5], adapter=4, activation="elu"),
    PolicySettings(hidden=[]),
    PolicySettings(hidden=[], adapter=3),
    PolicySettings(hidden=[], adapter=3, torso="shared"),
    PolicySettings(hidden=[8, 6], torso="shared", adapter=3, blocks={"all": ["torso.*", "actor"]}, shared=["all"]),
]


class UserNet(nn.Module):
    """A user's module: one hidden layer with layer normalisation, a head for each."""

    def __init__(self, observation_space: Space[Any], action_space: spaces.Discrete, width: int = 6) -> None:
        super().__init__()
        assert observation_space.shape is not None
        self.body = nn.Sequential(nn.Linear(observation_space.shape[0], width), nn.LayerNorm(width), nn.SiLU())
        self.pi = nn.Linear(width, int(action_space.n))
        self.v = nn.Linear(width, 1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(observations)
        return self.pi(hidden), self.v(hidden).squeeze(-1)


def user_policy(settings: PolicySettings | None = None, build: Any = UserNet) -> UserModulePolicy:
    boxes = (spaces.Box(-1, 1, (5,)), spaces.Discrete(3))
    return UserModulePolicy(
        build, boxes, 5, Categorical(3), settings or PolicySettings(module="a:B", shared=["body.*"])
    )


def random_parameters(policy: StackedPolicy, clients: int) -> Tensor:
    """Draw different parameters for every client, log standard deviations among them."""
    flat = torch.stack([policy.initial(seed) for seed in range(clients)])
    return flat + 0.3 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(9))


def pull_back(policy: StackedPolicy, pullback: Pullback, by: tuple[Tensor, Tensor | None], clients: int) -> Tensor:
    """Return the gradient that a pullback writes into memory that held NaN before."""
    gradient = torch.full((clients, policy.layout.size), torch.nan)
    pullback(by[0].clone(), by[1], policy.layout.views(gradient))
    return gradient


def autograd_gradient(
    policy: StackedPolicy, flat: Tensor, observations: Tensor, by: tuple[Tensor, Tensor | None]
) -> Tensor:
    leaf = flat.clone().requires_grad_()
    output = policy.forward(policy.layout.views(leaf), observations)
    total = (output.distribution * by[0]).sum()
    if by[1] is not None:
        total = total + (output.values * by[1]).sum()
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.torso}-{s.activation}-{len(s.hidden)}-{s.adapter}")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_the_pullback_of_our_network_equals_autograd(settings: PolicySettings, distribution: Distribution) -> None:
    torch.manual_seed(0)
    policy = ActorCritic(5, distribution, settings)
    flat, observations = random_parameters(policy, 3), torch.randn(3, 11, 5)
    output, pullback = policy.vjp(policy.layout.views(flat), observations)
    for by_values in (torch.randn(3, 11), None):
        by = (torch.randn(output.distribution.shape), by_values)
        expected = autograd_gradient(policy, flat, observations, by)
        torch.testing.assert_close(pull_back(policy, pullback, by, 3), expected, rtol=1e-4, atol=1e-5)


def test_the_pullback_of_a_user_module_equals_autograd() -> None:
    torch.manual_seed(0)
    policy = user_policy()
    flat, observations = random_parameters(policy, 2), torch.randn(2, 9, 5)
    _, pullback = policy.vjp(policy.layout.views(flat), observations)
    by = (torch.randn(2, 9, 3), torch.randn(2, 9))
    expected = autograd_gradient(policy, flat, observations, by)
    torch.testing.assert_close(pull_back(policy, pullback, by, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [*(ActorCritic(5, Gaussian(3), settings) for settings in SETTINGS), user_policy()])
def test_critic_vjp_equals_the_critics_part_of_vjp(policy: StackedPolicy) -> None:
    """Parameters that the actor uses get no gradient, and the distribution does not depend on the critic."""
    torch.manual_seed(0)
    flat, observations = random_parameters(policy, 2), torch.randn(2, 9, 5)
    views = policy.layout.views(flat)
    output, _ = policy.vjp(views, observations)
    values, pullback = policy.critic_vjp(views, observations)
    torch.testing.assert_close(values, output.values)
    by = (torch.zeros(output.distribution.shape), torch.randn(2, 9))
    gradient = torch.zeros_like(flat)
    pullback(by[1].clone(), policy.layout.views(gradient))
    expected = policy.layout.views(autograd_gradient(policy, flat, observations, by))
    for name, actual in policy.layout.views(gradient).items():
        if name in policy.actor_parameters():
            assert not actual.any()
        else:
            torch.testing.assert_close(actual, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.vjp(views, observations, critic=False)[0].distribution, output.distribution)


@pytest.mark.parametrize("distribution", [Gaussian(2), DISTRIBUTIONS[-1]], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.torso}-{s.activation}-{len(s.hidden)}-{s.adapter}")
def test_the_numpy_actor_equals_torch(settings: PolicySettings, distribution: Distribution) -> None:
    policy = ActorCritic(5, distribution, settings)
    flat, observations = random_parameters(policy, 3), torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    output = policy.forward(policy.layout.views(flat), observations).distribution
    arrays = policy.numpy_actor(policy.layout.views(flat.numpy()))(observations.numpy())
    np.testing.assert_allclose(arrays, output.numpy(), rtol=1e-4, atol=1e-5)


def test_a_stacked_user_module_equals_single_modules() -> None:
    policy = user_policy()
    flat, observations = random_parameters(policy, 3), torch.randn(3, 4, 5)
    output = policy.forward(policy.layout.views(flat), observations)
    for client, state in enumerate(policy.layout.unstack(flat)):
        net = UserNet(spaces.Box(-1, 1, (5,)), spaces.Discrete(3))
        net.load_state_dict(state)
        with torch.no_grad():
            distribution, values = net(observations[client])
        torch.testing.assert_close(output.distribution[client], distribution)
        torch.testing.assert_close(output.values[client], values)


def test_our_network_equals_plain_torch_modules() -> None:
    """Linear, tanh, Linear, tanh, Linear, built from torch's own modules with the same weights."""
    policy = ActorCritic(5, Categorical(3), PolicySettings(hidden=[8, 6]))
    flat, observations = random_parameters(policy, 1), torch.randn(1, 4, 5)
    values = policy.layout.unstack(flat)[0]
    layers: list[nn.Module] = []
    for name in ("torso.0", "torso.1", "actor"):
        layer = nn.Linear(*reversed(values[f"{name}.weight"].shape))
        layer.load_state_dict({"weight": values[f"{name}.weight"], "bias": values[f"{name}.bias"]})
        layers += [layer, nn.Tanh()]
    with torch.no_grad():
        expected = nn.Sequential(*layers[:-1])(observations[0])
        output = policy.act(policy.layout.views(flat), observations)[0]
    torch.testing.assert_close(output, expected)


def test_initial_weights_are_orthogonal_with_the_usual_gains() -> None:
    policy = ActorCritic(5, Gaussian(2), PolicySettings(hidden=[8, 6], log_std=-0.5))
    values = policy.layout.unstack(policy.initial(3)[None])[0]
    torch.testing.assert_close(values["torso.0.weight"].T @ values["torso.0.weight"], 2 * torch.eye(5))
    torch.testing.assert_close(values["actor.weight"] @ values["actor.weight"].T, 1e-4 * torch.eye(2))
    assert values["critic.head.weight"].norm().item() == pytest.approx(1.0)
    assert values["actor.log_std"].tolist() == [-0.5, -0.5]
    assert not values["torso.1.bias"].any()


def test_initial_parameters_depend_on_seed_name_and_shape_alone() -> None:
    """Clients with other observations begin with the same second layer; another seed gives other parameters."""
    narrow = ActorCritic(5, Categorical(3), PolicySettings(hidden=[8, 6]))
    wide = ActorCritic(9, Gaussian(2), PolicySettings(hidden=[8, 6], adapter=3))
    first, second = (p.layout.unstack(p.initial(4)[None])[0] for p in (narrow, wide))
    assert torch.equal(first["torso.1.weight"], second["torso.1.weight"])
    assert not torch.equal(narrow.initial(4), narrow.initial(5))
    assert not torch.equal(first["torso.1.weight"], first["critic.1.weight"])


def test_actor_parameters_are_those_the_distribution_depends_on() -> None:
    assert user_policy().actor_parameters() == {
        "body.0.weight",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "pi.weight",
        "pi.bias",
    }
    ours = ActorCritic(5, Gaussian(2), PolicySettings(hidden=[4]))
    assert ours.actor_parameters() == {
        "torso.0.weight",
        "torso.0.bias",
        "actor.weight",
        "actor.bias",
        "actor.log_std",
    }


def test_a_module_that_does_not_fit_its_task_is_refused() -> None:
    class TooWide(UserNet):
        def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
            distribution, values = super().forward(observations)
            return torch.cat([distribution, distribution], -1), values

    with pytest.raises(ValueError, match=r"policy.module = a:B.*\(2, 6\).*\(2, 3\)"):
        user_policy(build=TooWide)


class Frozen(UserNet):
    """A module whose body does not learn and whose values are 0."""

    def __init__(self, *spaces_: Any) -> None:
        super().__init__(*spaces_)
        self.body.requires_grad_(False)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(observations)[0], torch.zeros(len(observations))


def test_frozen_parameters_have_no_gradient() -> None:
    policy = user_policy(build=Frozen)
    flat, observations = random_parameters(policy, 2), torch.randn(2, 9, 5)
    _, pullback = policy.vjp(policy.layout.views(flat), observations)
    actual = policy.layout.views(pull_back(policy, pullback, (torch.randn(2, 9, 3), torch.randn(2, 9)), 2))
    assert {name for name, gradient in actual.items() if gradient.any()} == {"pi.weight", "pi.bias"}
    assert policy.actor_parameters() == {"pi.weight", "pi.bias"}


def test_a_module_whose_actor_is_frozen_is_refused() -> None:
    class Fixed(Frozen):
        def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
            output, values = super().forward(observations)
            return output.detach(), values

    with pytest.raises(ValueError, match=r"policy.module = a:B: its distribution parameters depend on no parameter"):
        user_policy(build=Fixed)


def test_a_module_with_buffers_is_refused() -> None:
    class Normed(UserNet):
        def __init__(self, *spaces_: Any) -> None:
            super().__init__(*spaces_)
            self.norm = nn.BatchNorm1d(3)

    with pytest.raises(ValueError, match="buffers"):
        user_policy(build=Normed)


class LinearPolicy(Policy):
    """Another kind of policy, with only what a federation needs: logits are a matrix times observations."""

    def __init__(self) -> None:
        self.layout = Layout.from_shapes({"actor.weight": (2, 3)}.items(), PolicySettings())
        self.distribution = Categorical(2)
        self.observation_size = 3

    def initial(self, seed: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(seed))

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return observations @ parameters["actor.weight"].mT

    def chain_of(self, parameter: str) -> str:
        return parameter


def test_the_kl_of_a_policy_needs_only_the_small_interface() -> None:
    """Logits (0, 0) and (0, log 3) are probabilities (1/2, 1/2) and (1/4, 3/4)."""
    policy = LinearPolicy()
    old, new = torch.zeros(1, 6), torch.tensor([[0.0, 0.0, 0.0, math.log(3), 0.0, 0.0]])
    states = MeasurementStates(torch.tensor([[[1.0, 5.0, 7.0]]]), torch.ones(1, 1))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert mean_kl(policy, states, old, [new])[0, 0].item() == pytest.approx(expected, rel=1e-5)
