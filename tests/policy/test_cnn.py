"""The network for pictures: stacked clients against torch's own modules one by one, sizes, blocks and groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grpo_fed.policy.cnn import CnnPolicy
from grpo_fed.policy.distributions import Categorical, Gaussian
from grpo_fed.policy.groups import cut_groups
from grpo_fed.policy.layers import apply_convolution, convolve_together
from grpo_fed.policy.make import make_policy, make_policy_from_shape
from grpo_fed.policy.shared import resolve_shared_blocks, resolve_shared_blocks_from_shapes
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import resolve_gym_tasks
from tests.policy.test_policy import pull_back, random_parameters

PIXELS = """
name = "pixels"
[policy]
kind = "cnn"
hidden = [8]
[[clients]]
name = "catch"
env = "grpo_fed/Catch-v0"
"""


class Residual(nn.Module):
    """A residual block of IMPALA, written independently of ours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding="same")
        self.second = nn.Conv2d(channels, channels, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.relu(self.first(functional.relu(x))))


class Sequence(nn.Module):
    """A sequence of IMPALA: convolution, pooling, two residual blocks."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding="same")
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.residual = nn.Sequential(Residual(channels), Residual(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.pool(self.conv(x)))


class Chain(nn.Module):
    """An encoder and hidden layers whose parameters have our names."""

    def __init__(self, encoder: str, channels: int, pixels: int, hidden: list[int]) -> None:
        super().__init__()
        if encoder == "nature":
            layers = [nn.Conv2d(channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
        else:
            layers = [Sequence(channels, 16), Sequence(16, 32), Sequence(32, 32)]
        self.after_each = encoder == "nature"
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        width = len(self.encode(torch.zeros(1, channels, pixels, pixels))[0])
        for number, units in enumerate(hidden, 3):
            self.add_module(str(number), nn.Linear(width, units))
            width = units
        self.hidden = len(hidden)

    def encode(self, x: Tensor) -> Tensor:
        for number in range(3):
            x = self.get_submodule(str(number))(x)
            x = functional.relu(x) if self.after_each else x
        return functional.relu(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        for number in range(3, 3 + self.hidden):
            x = torch.tanh(self.get_submodule(str(number))(x))
        return x


class Network(nn.Module):
    """The whole network of one client, of torch's own modules; its state dict has our names."""

    def __init__(self, encoder: str, channels: int, pixels: int, hidden: list[int], separate: bool) -> None:
        super().__init__()
        self.torso = Chain(encoder, channels, pixels, hidden)
        self.actor = nn.Linear(hidden[-1], 3)
        self.critic = Chain(encoder, channels, pixels, hidden) if separate else nn.Module()
        self.critic.head = nn.Linear(hidden[-1], 1)
        self.separate = separate

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.torso(pictures)
        last = self.critic(pictures) if self.separate else features
        return self.actor(features), self.critic.head(last).squeeze(-1)


@pytest.mark.parametrize(("encoder", "pixels", "separate"), [("nature", 38, True), ("impala", 13, False)])
@pytest.mark.parametrize("channels_first", [True, False])
def test_stacked_clients_equal_torch_modules_one_by_one(
    encoder: str, pixels: int, separate: bool, channels_first: bool
) -> None:
    """Distributions, values, features and gradients of three clients, with channels in front or behind."""
    shape = (2, pixels, pixels) if channels_first else (pixels, pixels, 2)
    torso = "separate" if separate else "shared"
    settings = PolicySettings(kind="cnn", encoder=encoder, hidden=[7, 5], torso=torso)  # type: ignore[arg-type]
    policy = CnnPolicy(shape, Categorical(3), settings)
    draws = torch.Generator().manual_seed(2)
    flat = random_parameters(policy, 3)
    pictures = torch.randint(0, 256, (3, 4, *shape), generator=draws, dtype=torch.uint8)
    observations = pictures.flatten(2)
    views = policy.layout.views(flat)
    output, pullback = policy.vjp(views, observations)
    by = torch.randn(3, 4, 3, generator=draws), torch.randn(3, 4, generator=draws)
    gradient = policy.layout.views(pull_back(policy, pullback, by, 3))
    acted = policy.numpy_actor(policy.layout.views(flat.numpy()))(observations.numpy())
    for client, state in enumerate(policy.layout.unstack(flat)):
        network = Network(encoder, 2, pixels, [7, 5], separate)
        network.load_state_dict(state)
        seen = pictures[client] if channels_first else pictures[client].permute(0, 3, 1, 2)
        logits, values = network(seen / 255)
        torch.testing.assert_close(output.distribution[client], logits.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.values[client], values.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(acted[client], logits.detach(), rtol=1e-5, atol=1e-5)
        features = policy.features(views, observations)[client]
        torch.testing.assert_close(features, network.torso(seen / 255).detach(), rtol=1e-5, atol=1e-5)
        ((logits * by[0][client]).sum() + (values * by[1][client]).sum()).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradient[name][client], parameter.grad, rtol=1e-5, atol=1e-5 * max(scale, 1))


def test_the_critics_part_leaves_the_actor_alone() -> None:
    settings = PolicySettings(kind="cnn", hidden=[4], torso="shared")
    policy = CnnPolicy((1, 36, 36), Gaussian(2), settings)
    flat = random_parameters(policy, 2)
    observations = torch.randint(0, 256, (2, 3, 36 * 36), dtype=torch.uint8)
    values, pullback = policy.critic_vjp(policy.layout.views(flat), observations)
    gradient = torch.zeros_like(flat)
    pullback(torch.ones(2, 3), policy.layout.views(gradient))
    assert {name for name, part in policy.layout.views(gradient).items() if part.any()} == {
        "critic.head.weight",
        "critic.head.bias",
    }
    torch.testing.assert_close(values, policy.forward(policy.layout.views(flat), observations).values)
    alone, _ = policy.vjp(policy.layout.views(flat), observations, critic=False)
    torch.testing.assert_close(alone.distribution, policy.act(policy.layout.views(flat), observations))


def test_one_grouped_convolution_equals_one_for_each_client() -> None:
    """The form for a GPU, computed on the CPU."""
    draws = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 4, 2, 3, 3, generator=draws), torch.randn(3, 4, generator=draws)
    pictures = torch.randn(3, 5, 2, 9, 8, generator=draws)
    expected = apply_convolution({"c.weight": weight, "c.bias": bias}, "c", pictures, stride=2, padding=1)
    torch.testing.assert_close(convolve_together(pictures, weight, bias, 2, 1), expected, rtol=1e-4, atol=1e-5)


def test_uint8_is_scaled_and_normalised_numbers_are_not() -> None:
    policy = CnnPolicy((36, 36), Categorical(2), PolicySettings(kind="cnn", hidden=[4]))
    views = policy.layout.views(random_parameters(policy, 1))
    pictures = torch.randint(0, 256, (1, 2, 36 * 36), dtype=torch.uint8)
    torch.testing.assert_close(policy.act(views, pictures), policy.act(views, pictures.float() / 255))


def test_first_weights_are_orthogonal_or_as_torchs_own_layers() -> None:
    """32 filters of 2 x 8 x 8 have 128 inputs: rows of norm sqrt(2), or numbers up to 128^(-1/2)."""
    policy = CnnPolicy((2, 42, 42), Categorical(3), PolicySettings(kind="cnn", hidden=[4]))
    weight = policy.layout.unstack(policy.initial(3)[None])[0]["torso.0.weight"].flatten(1)
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(32))
    uniform = CnnPolicy((2, 42, 42), Categorical(3), PolicySettings(kind="cnn", hidden=[4], orthogonal=False))
    values = uniform.layout.unstack(uniform.initial(3)[None])[0]
    for name in ("torso.0.weight", "torso.0.bias"):
        assert 0.9 * 128**-0.5 < values[name].abs().max() <= 128**-0.5


def test_blocks_are_layers_and_groups_their_channels() -> None:
    policy = CnnPolicy((2, 42, 42), Categorical(3), PolicySettings(kind="cnn", hidden=[8], torso="shared"))
    blocks = [block.name for block in policy.layout.blocks]
    assert blocks == ["torso.0", "torso.1", "torso.2", "torso.3", "actor", "critic"]
    assert [block.name for block in policy.layout.shared] == blocks[:-1]
    groups = cut_groups(policy.layout, {"torso.0": "row", "torso.1": "column"})
    sizes = dict(zip(groups.names, groups.sizes.tolist(), strict=True))
    assert sizes["torso.0.weight:rows[31]"] == 2 * 8 * 8 + 1  # an output channel with its bias
    assert sizes["torso.1.weight:columns[31]"] == 64 * 4 * 4  # an input channel
    assert [policy.chain_of(f"{name}.weight") for name in ("torso.0", "torso.3")] == ["actor", "actor"]


def catch_task(*overrides: str) -> tuple[GymTask, Scenario]:
    """Make the task of a client of Catch, and its scenario."""
    scenario = Scenario.loads(PIXELS, overrides=overrides)
    return resolve_gym_tasks(scenario)[0], scenario


def test_pictures_without_a_network_for_pictures_are_refused_with_the_cure() -> None:
    task, scenario = catch_task("policy.kind=mlp")
    with pytest.raises(ValueError, match=r'client catch .*2 x 42 x 42 of uint8: set policy.kind = "cnn", or'):
        make_policy(task, scenario.policy)


def test_other_observations_have_no_network_for_pictures() -> None:
    task, scenario = catch_task("clients.0.env=grpo_fed/CartPole-v1")
    with pytest.raises(ValueError, match=r'"cnn" is for pictures.* here have 4 numbers; use policy.kind = "mlp"'):
        make_policy(task, scenario.policy)


def test_pictures_that_are_too_small_for_the_encoder_are_refused_with_their_size() -> None:
    settings = PolicySettings(kind="cnn")
    with pytest.raises(ValueError, match=r'36 x 36 pixels or more, and these have 35 x 60; use "impala", or'):
        CnnPolicy((35, 60, 3), Categorical(2), settings)
    small = CnnPolicy((5, 7, 3), Categorical(2), settings.model_copy(update={"encoder": "impala"}))
    assert small.encoder.features == 32 * 1 * 1
    assert CnnPolicy((36, 36, 3), Categorical(2), settings).encoder.features == 64 * 1 * 1


def test_a_server_without_the_environment_makes_the_same_policy() -> None:
    task, scenario = catch_task()
    policy = make_policy_from_shape(task.shape, scenario)
    assert isinstance(policy, CnnPolicy)
    assert policy.layout == make_policy(task, scenario.policy).layout
    shared = resolve_shared_blocks_from_shapes(scenario, {"catch": task.shape})
    assert shared.digest == resolve_shared_blocks(scenario).digest
    assert task.shape.signature != replace(task.shape, picture=(42, 2, 42)).signature
