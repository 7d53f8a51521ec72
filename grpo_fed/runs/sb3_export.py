"""Writes a network as a PPO of stable-baselines3, which its own `PPO.load` opens.

The client's normaliser becomes a `VecNormalize` in a file of its own, as users of that library have it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import Tensor, nn

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.rl.normalise import EPSILON, ObservationNormaliser
from grpo_fed.runs.policies import LoadedPolicy
from grpo_fed.scenario.extras import write_install_command
from grpo_fed.tasks.action_spaces import is_nested

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

MODEL, NORMALISER = "ppo.zip", "vecnormalize.pkl"
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}


def export_to_sb3(saved: LoadedPolicy, folder: Path) -> None:
    """Write `ppo.zip`, and with a normaliser `vecnormalize.pkl`, to a folder.

    ValueError if stable-baselines3 is missing, or has no policy that does the same.
    """
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.vec_env import DummyVecEnv
    except ImportError as error:
        raise ValueError(f"--to sb3 needs stable-baselines3: {write_install_command('sb3')}") from error
    if is_nested(saved.task.action_space):
        text = f"stable-baselines3 takes no actions from {saved.task.action_space}; use --to safetensors"
        raise ValueError(f"client {saved.task.client}: {text}")
    if problem := _find_problem(saved):
        raise ValueError(f"client {saved.task.client}: {problem}; use --to onnx or torch-export")
    policy, settings = saved.policy, saved.scenario
    assert isinstance(policy, ActorCritic)
    hidden, adapter = list(settings.policy.hidden), [settings.policy.adapter] if settings.policy.adapter else []
    env = DummyVecEnv([lambda: _Spaces(saved.task.observation_space, saved.task.action_space)])
    model = PPO(
        "MlpPolicy",
        env,
        device="cpu",
        policy_kwargs={
            "net_arch": {"pi": adapter + hidden, "vf": hidden if policy.separate else adapter + hidden},
            "activation_fn": ACTIVATIONS[settings.policy.activation],
            "normalize_images": False,
        },
        learning_rate=saved.task.learning_rate,
        gamma=settings.objective.gamma,
        n_steps=max(2, settings.rollout.horizon),
        batch_size=max(2, settings.rollout.horizon),
    )
    model.policy.load_state_dict(_name_parameters(policy, saved.parameters))
    model.save(folder / MODEL)
    if saved.normaliser is not None:
        _save_normaliser(saved.normaliser, env, settings.objective.gamma, folder / NORMALISER)


def _find_problem(saved: LoadedPolicy) -> str | None:
    """Say why stable-baselines3 has no policy that does the same; None if it has."""
    seen, action, kind = saved.task.observation_space, saved.task.action_space, saved.task.action.kind
    if not isinstance(saved.policy, ActorCritic):
        own = "a module of your own" if saved.scenario.policy.module else "a network for pictures or with a memory"
        return f"its policy is {own}, of which stable-baselines3 has no counterpart here"
    if not isinstance(seen, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return f"stable-baselines3 has no MlpPolicy for observations from {seen}"
    if saved.normaliser is not None and not isinstance(seen, spaces.Box):
        return f"VecNormalize of stable-baselines3 does not normalise observations from {seen}"
    if np.any(getattr(seen, "start", 0)) or any(saved.task.action.start):
        return "stable-baselines3 counts choices from 0, and those of its environment begin elsewhere"
    if isinstance(action, spaces.MultiBinary):
        return f"stable-baselines3 has a distribution of another form for actions from {action}"
    if kind == "gaussian" and saved.scenario.policy.squash:
        return "policy.squash = true, and stable-baselines3 squashes actions only with noise that depends on the state"
    if kind == "gaussian" and np.dtype(action.dtype).kind != "f":
        return f"stable-baselines3 does not round actions, as those from {action} are"
    if kind == "gaussian" and not np.isfinite([*saved.task.action.low, *saved.task.action.high]).all():
        return f"stable-baselines3 takes no actions without bounds, as those from {action} are"
    return None


def _name_parameters(policy: ActorCritic, parameters: Tensor) -> dict[str, Tensor]:
    """Give the parameters [1, P] the names that they have in stable-baselines3's `ActorCriticPolicy`.

    A critic that shares the actor's layers gets a copy of them, since that library has no shared layers.
    """
    (arrays,) = policy.layout.unstack(parameters)
    torsos = {"policy_net": policy.torso, "value_net": policy.critic if policy.separate else policy.torso}
    names = {
        f"mlp_extractor.{net}.{2 * place}": layer
        for net, layers in torsos.items()
        for place, layer in enumerate(layers)
    }
    names |= {"action_net": "actor", "value_net": "critic.head"}
    named = {
        f"{theirs}.{part}": arrays[f"{ours}.{part}"] for theirs, ours in names.items() for part in ("weight", "bias")
    }
    if policy.distribution.continuous:
        named["log_std"] = arrays["actor.log_std"]
    return named


def _save_normaliser(normaliser: ObservationNormaliser, env: VecEnv, gamma: float, path: Path) -> None:
    """Save a normaliser as a `VecNormalize` that learns no more and leaves rewards as they are."""
    from stable_baselines3.common.vec_env import VecNormalize

    wrapped = VecNormalize(
        env, training=False, norm_reward=False, clip_obs=normaliser.clip, gamma=gamma, epsilon=EPSILON
    )
    moments, shape = normaliser.moments, env.observation_space.shape
    theirs: Any = wrapped.obs_rms  # a table of them for observations of several parts, which are refused
    theirs.mean, theirs.var = moments.mean[0].reshape(shape), moments.variance[0].reshape(shape)
    theirs.count = float(moments.count[0])
    wrapped.save(str(path))


class _Spaces(gymnasium.Env[Any, Any]):
    """Stands for an environment of which only the spaces matter; none is made, since its package may be missing."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
