"""The objective compared with stable-baselines3's own training step, on a rollout that is made by hand."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import explained_variance as explained_by_peer
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from grpo_fed.policy.base import PolicyOutput
from grpo_fed.policy.distributions import Categorical, Distribution, Gaussian, MultiCategorical
from grpo_fed.rl import objective
from grpo_fed.rl.objective import Coefficients, LossTerms
from grpo_fed.rl.records import Minibatch
from grpo_fed.scenario.settings import ObjectiveSettings, TrustSettings

FREE = TrustSettings()


class Unmoved(gymnasium.Env[np.ndarray, Any]):
    """Spaces, and nothing that happens."""

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.observation_space = spaces.Box(-1, 1, (4,))
        self.action_space = action_space


def fill_rollout_buffer(peer: PPO | A2C, action_space: spaces.Space[Any], seed: int = 0) -> None:
    """Fill the peer's rollout buffer so that ratios and values leave their clips on either side."""
    peer.set_logger(Logger(None, []))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    action_space.seed(seed)
    buffer = peer.rollout_buffer
    steps, copies = buffer.buffer_size, buffer.n_envs
    with torch.no_grad():
        for one in peer.policy.parameters():
            one.add_(0.3 * torch.randn_like(one))
    buffer.reset()
    for _ in range(steps):
        observations = rng.standard_normal((copies, 4)).astype(np.float32)
        actions = np.stack([np.asarray(action_space.sample()) for _ in range(copies)]).reshape(copies, -1)
        spread = torch.from_numpy(actions[:, 0] if isinstance(action_space, spaces.Discrete) else actions)
        with torch.no_grad():
            values, log_probs, _ = peer.policy.evaluate_actions(torch.from_numpy(observations), spread)
        old_values = values + torch.from_numpy(rng.normal(0, 0.4, (copies, 1)).astype(np.float32))
        old_log_probs = log_probs + torch.from_numpy(rng.normal(0, 0.4, copies).astype(np.float32))
        buffer.add(observations, actions, rng.standard_normal(copies), np.zeros(copies), old_values, old_log_probs)
    buffer.compute_returns_and_advantage(torch.zeros(copies), np.ones(copies))


def output_of_peer(peer: PPO | A2C, observations: Tensor) -> PolicyOutput:
    """What the peer's network says, as ours would."""
    policy = peer.policy
    for_actor, for_critic = policy.mlp_extractor(policy.extract_features(observations))
    parameters = policy.action_net(for_actor)
    if isinstance(peer.action_space, spaces.Box):
        parameters = torch.cat((parameters, policy.log_std.expand_as(parameters)), -1)
    return PolicyOutput(parameters[None], policy.value_net(for_critic).squeeze(-1)[None])


def minibatch_of(peer: PPO | A2C) -> Minibatch:
    data = next(peer.rollout_buffer.get())
    count = len(data.observations)
    scalars = (data.old_log_prob, torch.zeros(count, 0), data.advantages, data.returns, data.old_values)
    rest = (data.observations, data.actions.view(count, -1), *scalars, torch.full((count,), 1 / count))
    return Minibatch(*(one[None] for one in rest))


SPACES = [
    (spaces.Discrete(3), Categorical(3)),
    (spaces.MultiDiscrete([2, 3]), MultiCategorical((2, 3))),
    (spaces.Box(-1, 1, (2,)), Gaussian(2)),
]


def assert_equal_loss_and_gradient(
    peer: PPO | A2C, distribution: Distribution, ours: ObjectiveSettings, coefficients: Coefficients
) -> LossTerms:
    """The loss and the gradient by every weight of the network, to a relative error of 1e-5 or a rounding of float32.

    Terms of a size of one may cancel in a weight's gradient; what remains has the rounding of the terms, 1e-7.
    """
    batch = minibatch_of(peer)
    weights = list(peer.policy.parameters())
    found, terms = objective.loss(
        output_of_peer(peer, batch.observations[0]), batch, distribution, ours, FREE, coefficients
    )
    mine = torch.autograd.grad(found.sum(), weights)
    before = [one.detach().clone() for one in weights]
    peer.train()  # with plain gradient descent and a step of 1
    for old, new, gradient in zip(before, weights, mine, strict=True):
        assert new.grad is not None
        assert (gradient - new.grad).norm() < 1e-5 * new.grad.norm() + 1e-7
        torch.testing.assert_close(old - new.detach(), new.grad, rtol=1e-3, atol=1e-5)
    return terms


@pytest.mark.parametrize("value_clip", [None, 0.2])
@pytest.mark.parametrize(("space", "distribution"), SPACES, ids=[str(one[1]) for one in SPACES])
def test_the_ppo_loss_is_that_of_stable_baselines3(
    space: spaces.Space[Any], distribution: Distribution, value_clip: float | None
) -> None:
    peer = PPO(
        "MlpPolicy",
        DummyVecEnv([lambda: Unmoved(space)] * 2),
        n_steps=64,
        batch_size=128,
        n_epochs=1,
        learning_rate=1.0,
        clip_range=0.2,
        clip_range_vf=value_clip,
        ent_coef=0.03,
        vf_coef=0.7,
        max_grad_norm=1e9,
        policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
        device="cpu",
    )
    fill_rollout_buffer(peer, space)
    entropy = torch.full((1, distribution.components), 0.03)
    terms = assert_equal_loss_and_gradient(
        peer, distribution, ObjectiveSettings(), Coefficients(0.2, 0.2, 0.7, entropy, 0.0, value_clip)
    )
    said = peer.logger.name_to_value
    assert 0.1 < said["train/clip_fraction"] < 0.9
    assert terms.loss.item() == pytest.approx(said["train/loss"], rel=1e-5)
    assert terms.policy_loss.item() == pytest.approx(said["train/policy_gradient_loss"], rel=1e-5, abs=1e-6)
    assert terms.value_loss.item() == pytest.approx(said["train/value_loss"], rel=1e-5)
    assert terms.entropy.item() == pytest.approx(-said["train/entropy_loss"], rel=1e-5)
    assert terms.approx_kl.item() == pytest.approx(said["train/approx_kl"], rel=1e-4)
    assert terms.clipfrac.item() == pytest.approx(said["train/clip_fraction"])


def test_the_a2c_loss_is_that_of_stable_baselines3() -> None:
    space, distribution = SPACES[0]
    peer = A2C(
        "MlpPolicy",
        DummyVecEnv([lambda: Unmoved(space)] * 2),
        n_steps=16,
        learning_rate=1.0,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=1e9,
        use_rms_prop=False,
        policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
        device="cpu",
    )
    fill_rollout_buffer(peer, space)
    ours = ObjectiveSettings(surrogate="score", normalise_advantages="off")
    assert_equal_loss_and_gradient(peer, distribution, ours, Coefficients(0.2, 0.2, 0.5, torch.full((1, 1), 0.01)))


def test_explained_variance_is_that_of_stable_baselines3() -> None:
    rng = np.random.default_rng(0)
    returns, values = rng.standard_normal((2, 50))
    found = objective.explained_variance(
        *(torch.from_numpy(a).view(1, 10, 5) for a in (returns, values)), torch.ones(1, 10, 5) > 0
    )
    assert found.item() == pytest.approx(explained_by_peer(values, returns))
