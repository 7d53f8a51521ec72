"""Policies: backpropagation by hand against autograd, stacked against single networks, and a user's own module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.base import Policy, Pullback
from grpo_fed.policy.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
from grpo_fed.policy.user_module import UserModulePolicy
from grpo_fed.scenario.settings import PolicySettings

DISTRIBUTIONS: list[Distribution] = [Categorical(3), MultiCategorical((2, 4)), Gaussian(2), SquashedGaussian(2)]
SETTINGS = [
    PolicySettings(hidden=[8, 6]),
    PolicySettings(hidden=[8], torso="shared", activation="relu"),
    PolicySettings(hidden=[7, 5], adapter=4, activation="elu"),
    PolicySettings(hidden=[]),
    PolicySettings(hidden=[], adapter=3),
    PolicySettings(hidden=[], adapter=3, torso="shared"),
    PolicySettings(hidden=[8, 6], torso="shared", adapter=3, blocks={"all": ["torso.*", "actor"]}, shared=["all"]),
]


class OwnNet(nn.Module):
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


def own(settings: PolicySettings | None = None, build: Any = OwnNet) -> UserModulePolicy:
    boxes = (spaces.Box(-1, 1, (5,)), spaces.Discrete(3))
    return UserModulePolicy(
        build, boxes, 5, Categorical(3), settings or PolicySettings(module="a:B", shared=["body.*"])
    )


def parameters_of(policy: Policy, clients: int) -> Tensor:
    """Unlike parameters for every client, log standard deviations among them."""
    flat = torch.stack([policy.initial(seed) for seed in range(clients)])
    return flat + 0.3 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(9))


def pulled(policy: Policy, pullback: Pullback, by: tuple[Tensor, Tensor | None], clients: int) -> Tensor:
    """The gradient that a pullback writes, over what stood there before."""
    gradient = torch.full((clients, policy.layout.size), torch.nan)
    pullback(by[0].clone(), by[1], policy.layout.views(gradient))
    return gradient


def autograd(policy: Policy, flat: Tensor, observations: Tensor, by: tuple[Tensor, Tensor | None]) -> Tensor:
    leaf = flat.clone().requires_grad_()
    said = policy.forward(policy.layout.views(leaf), observations)
    total = (said.distribution * by[0]).sum()
    if by[1] is not None:
        total = total + (said.values * by[1]).sum()
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.torso}-{s.activation}-{len(s.hidden)}-{s.adapter}")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_backpropagation_by_hand_is_autograds(settings: PolicySettings, distribution: Distribution) -> None:
    torch.manual_seed(0)
    policy = ActorCritic(5, distribution, settings)
    flat, observations = parameters_of(policy, 3), torch.randn(3, 11, 5)
    said, pullback = policy.vjp(policy.layout.views(flat), observations)
    for by_values in (torch.randn(3, 11), None):
        by = (torch.randn(said.distribution.shape), by_values)
        expected = autograd(policy, flat, observations, by)
        torch.testing.assert_close(pulled(policy, pullback, by, 3), expected, rtol=1e-4, atol=1e-5)


def test_backpropagation_of_a_users_module_is_autograds() -> None:
    torch.manual_seed(0)
    policy = own()
    flat, observations = parameters_of(policy, 2), torch.randn(2, 9, 5)
    _, pullback = policy.vjp(policy.layout.views(flat), observations)
    by = (torch.randn(2, 9, 3), torch.randn(2, 9))
    expected = autograd(policy, flat, observations, by)
    torch.testing.assert_close(pulled(policy, pullback, by, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [*(ActorCritic(5, Gaussian(3), settings) for settings in SETTINGS), own()])
def test_the_critic_alone_says_and_learns_what_it_does_beside_the_actor(policy: Policy) -> None:
    """Parameters that the actor uses get no gradient; without the critic the actor says the same."""
    torch.manual_seed(0)
    flat, observations = parameters_of(policy, 2), torch.randn(2, 9, 5)
    views = policy.layout.views(flat)
    said, _ = policy.vjp(views, observations)
    values, pullback = policy.critic_vjp(views, observations)
    torch.testing.assert_close(values, said.values)
    by = (torch.zeros(said.distribution.shape), torch.randn(2, 9))
    gradient = torch.zeros_like(flat)
    pullback(by[1].clone(), policy.layout.views(gradient))
    expected = policy.layout.views(autograd(policy, flat, observations, by))
    for name, found in policy.layout.views(gradient).items():
        if name in policy.actor_parameters():
            assert not found.any()
        else:
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.vjp(views, observations, critic=False)[0].distribution, said.distribution)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.torso}-{s.activation}-{len(s.hidden)}-{s.adapter}")
def test_a_rollouts_numpy_says_what_torch_says(settings: PolicySettings) -> None:
    policy = ActorCritic(5, Gaussian(2), settings)
    flat, observations = parameters_of(policy, 3), torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    said = policy.forward(policy.layout.views(flat), observations).distribution
    arrays = policy.numpy_actor(policy.layout.views(flat.numpy()))(observations.numpy())
    np.testing.assert_allclose(arrays, said.numpy(), rtol=1e-4, atol=1e-5)


def test_a_stack_says_what_each_users_module_says_alone() -> None:
    policy = own()
    flat, observations = parameters_of(policy, 3), torch.randn(3, 4, 5)
    said = policy.forward(policy.layout.views(flat), observations)
    for client, state in enumerate(policy.layout.unstack(flat)):
        net = OwnNet(spaces.Box(-1, 1, (5,)), spaces.Discrete(3))
        net.load_state_dict(state)
        with torch.no_grad():
            distribution, values = net(observations[client])
        torch.testing.assert_close(said.distribution[client], distribution)
        torch.testing.assert_close(said.values[client], values)


def test_our_network_is_the_plain_torch_network() -> None:
    """Linear, tanh, Linear, tanh, Linear, built from torch's own modules with the same weights."""
    policy = ActorCritic(5, Categorical(3), PolicySettings(hidden=[8, 6]))
    flat, observations = parameters_of(policy, 1), torch.randn(1, 4, 5)
    values = policy.layout.unstack(flat)[0]
    layers: list[nn.Module] = []
    for name in ("torso.0", "torso.1", "actor"):
        layer = nn.Linear(*reversed(values[f"{name}.weight"].shape))
        layer.load_state_dict({"weight": values[f"{name}.weight"], "bias": values[f"{name}.bias"]})
        layers += [layer, nn.Tanh()]
    with torch.no_grad():
        expected = nn.Sequential(*layers[:-1])(observations[0])
        said = policy.act(policy.layout.views(flat), observations)[0]
    torch.testing.assert_close(said, expected)


def test_the_start_is_orthogonal_with_the_usual_gains() -> None:
    policy = ActorCritic(5, Gaussian(2), PolicySettings(hidden=[8, 6], log_std=-0.5))
    values = policy.layout.unstack(policy.initial(3)[None])[0]
    torch.testing.assert_close(values["torso.0.weight"].T @ values["torso.0.weight"], 2 * torch.eye(5))
    torch.testing.assert_close(values["actor.weight"] @ values["actor.weight"].T, 1e-4 * torch.eye(2))
    assert values["critic.head.weight"].norm().item() == pytest.approx(1.0)
    assert values["actor.log_std"].tolist() == [-0.5, -0.5]
    assert not values["torso.1.bias"].any()


def test_the_start_depends_on_seed_name_and_shape_alone() -> None:
    """A client with other observations begins with the same second layer; another seed begins elsewhere."""
    one = ActorCritic(5, Categorical(3), PolicySettings(hidden=[8, 6]))
    other = ActorCritic(9, Gaussian(2), PolicySettings(hidden=[8, 6], adapter=3))
    first, second = (p.layout.unstack(p.initial(4)[None])[0] for p in (one, other))
    assert torch.equal(first["torso.1.weight"], second["torso.1.weight"])
    assert not torch.equal(one.initial(4), one.initial(5))
    assert not torch.equal(first["torso.1.weight"], first["critic.1.weight"])


def test_the_actors_parameters_are_those_that_move_the_distribution() -> None:
    assert own().actor_parameters() == {
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


def test_a_module_that_does_not_fit_its_task_is_refused_with_the_shapes() -> None:
    class TooWide(OwnNet):
        def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
            distribution, values = super().forward(observations)
            return torch.cat([distribution, distribution], -1), values

    with pytest.raises(ValueError, match=r"policy.module = a:B.*\(2, 6\).*\(2, 3\)"):
        own(build=TooWide)


class Frozen(OwnNet):
    """Its body does not learn, and its critic says nothing."""

    def __init__(self, *spaces_: Any) -> None:
        super().__init__(*spaces_)
        self.body.requires_grad_(False)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(observations)[0], torch.zeros(len(observations))


def test_what_a_module_has_frozen_does_not_learn() -> None:
    policy = own(build=Frozen)
    flat, observations = parameters_of(policy, 2), torch.randn(2, 9, 5)
    _, pullback = policy.vjp(policy.layout.views(flat), observations)
    found = policy.layout.views(pulled(policy, pullback, (torch.randn(2, 9, 3), torch.randn(2, 9)), 2))
    assert {name for name, gradient in found.items() if gradient.any()} == {"pi.weight", "pi.bias"}
    assert policy.actor_parameters() == {"pi.weight", "pi.bias"}


def test_a_module_that_cannot_learn_to_act_is_refused() -> None:
    class Fixed(Frozen):
        def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
            said, values = super().forward(observations)
            return said.detach(), values

    with pytest.raises(ValueError, match=r"policy.module = a:B: its distribution parameters depend on no parameter"):
        own(build=Fixed)


def test_a_module_with_buffers_is_refused() -> None:
    class Normed(OwnNet):
        def __init__(self, *spaces_: Any) -> None:
            super().__init__(*spaces_)
            self.norm = nn.BatchNorm1d(3)

    with pytest.raises(ValueError, match="buffers"):
        own(build=Normed)
