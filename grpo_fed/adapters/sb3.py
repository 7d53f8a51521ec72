"""On-policy algorithms of stable-baselines3, unchanged: PPO, A2C, and TRPO of sb3-contrib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from grpo_fed.adapters.learner import LearnerReport, Memory, Policies, TorchLearner
from grpo_fed.scenario.extras import write_install_command

if TYPE_CHECKING:
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.vec_env import VecNormalize


def sb3_learner(model: OnPolicyAlgorithm, steps: int, episodes: int = 10) -> TorchLearner:
    """Make a learner of a model that was made with its environment.

    Its arrays are the parameters of `model.policy`: of `MlpPolicy` the torso `mlp_extractor.policy_net.*`, the head
    `action_net.*`, and the critic `mlp_extractor.value_net.*` and `value_net.*`. A schedule of the algorithm begins
    anew with each round; give one by `ClientInfo.round` in its place.

    steps: environment steps of a round. episodes: of an evaluation, with deterministic actions.

    ValueError for an algorithm that learns from older experience, which does not survive a round.
    """
    try:
        from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    except ImportError as error:
        raise ImportError(f"stable-baselines3 is not installed: {write_install_command('sb3')}") from error
    if not isinstance(model, OnPolicyAlgorithm):
        raise ValueError(
            f"{type(model).__name__} keeps a replay buffer, which a client does not send or keep; use an on-policy"
            " algorithm, such as PPO"
        )
    if hasattr(model.policy, "lstm_actor"):
        raise ValueError(f"{type(model).__name__} has a recurrent policy, of which no KL is measured; use PPO")
    shape = model.observation_space.shape
    if shape is None:
        raise ValueError("observations of several parts are not supported; flatten them in the environment")
    normaliser = model.get_vec_normalize_env()

    def train() -> LearnerReport:
        model.learn(steps)
        observations = torch.from_numpy(model.rollout_buffer.observations.reshape(-1, *shape))
        returns = [episode["r"] for episode in model.ep_info_buffer or []]
        metrics = {"return": float(np.mean(returns))} if returns else {}
        return LearnerReport(model.num_timesteps, observations, metrics)

    def distribution(observations: Tensor) -> Policies:
        found: Policies = model.policy.get_distribution(observations.to(model.device)).distribution
        return found

    def evaluate() -> Mapping[str, float]:
        return {"return": _play(model, episodes)}

    memory = None if normaliser is None else Memory(lambda: _statistics(normaliser), lambda s: _restore(normaliser, s))
    return TorchLearner(model.policy, train, distribution, evaluate, model.policy.optimizer, memory)


def _play(model: OnPolicyAlgorithm, episodes: int) -> float:
    """Return the mean return of some episodes in the model's environments, without learning."""
    from stable_baselines3.common.evaluation import evaluate_policy

    env, normaliser = model.get_env(), model.get_vec_normalize_env()
    assert env is not None, "the model was made with its environment"
    if normaliser is not None:
        normaliser.training = normaliser.norm_reward = False  # the learner is made anew before it trains again
    mean, _ = evaluate_policy(model, env, episodes, deterministic=True, warn=False)
    return float(np.mean(mean))


def _statistics(normaliser: VecNormalize) -> dict[str, np.ndarray]:
    """Copy the running means of observations and returns."""
    return {
        f"{name}.{key}": np.array(getattr(running, key))
        for name, running in _running_means(normaliser).items()
        for key in ("mean", "var", "count")
    }


def _restore(normaliser: VecNormalize, arrays: Mapping[str, np.ndarray]) -> None:
    """Put the running means back that `_statistics` copied."""
    for name, running in _running_means(normaliser).items():
        running.mean, running.var = arrays[f"{name}.mean"].copy(), arrays[f"{name}.var"].copy()
        running.count = float(arrays[f"{name}.count"])


def _running_means(normaliser: VecNormalize) -> dict[str, Any]:
    """Name the running means that a normaliser uses."""
    observations = {"observations": normaliser.obs_rms} if normaliser.norm_obs else {}
    return {**observations, "returns": normaliser.ret_rms}
