"""A client's policy as a torch module without our code: flat observations in, the environment's actions out."""

from __future__ import annotations

import copy
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from grpo_fed.policy.user_module import UserModulePolicy
from grpo_fed.rl.normalise import EPSILON
from grpo_fed.runs.policies import LoadedPolicy
from grpo_fed.tasks.action_spaces import is_nested
from grpo_fed.tasks.gym_task import GymTask


@final
class Predictor(nn.Module):
    """Computes the likeliest actions [B, ...] for observations [B, D] as the environment gives them, but flat.

    It consists of operations that `torch.export` supports, so that it can be saved and loaded without our code.
    """

    mean: Tensor
    scale: Tensor
    start: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, saved: LoadedPolicy) -> None:
        """Copy the network, the normaliser's moments and the action space of a client's policy.

        ValueError for a policy with memory, which is no function of an observation, and for actions of several parts.
        """
        super().__init__()
        if is_nested(saved.task.action_space):
            raise ValueError(
                f"client {saved.task.client}: its actions are from {saved.task.action_space}, and a graph returns one"
                " array; use grpo_fed.load_policy, or --to safetensors with policy.json, which says where each part is"
            )
        if saved.policy.memory_size:
            raise ValueError(
                f"client {saved.task.client}: a policy with memory is no function of an observation; use"
                " grpo_fed.load_policy, or export its parameters as safetensors"
            )
        self.policy = saved.policy
        self.names = {name: name.replace(".", "__") for name in saved.policy.layout.views(saved.parameters)}
        views = saved.policy.layout.views(saved.parameters)
        self.module: nn.Module | None = None
        if isinstance(saved.policy, UserModulePolicy):
            self.module = copy.deepcopy(saved.policy.template)
            self.module.load_state_dict({name: value[0] for name, value in views.items()})
        else:
            for name, value in views.items():
                self.register_parameter(self.names[name], nn.Parameter(value.clone(), requires_grad=False))
        self.is_normalised = saved.normaliser is not None
        if saved.normaliser is not None:
            moments = saved.normaliser.moments
            self.clip = saved.normaliser.clip
            self.register_buffer("mean", torch.from_numpy(moments.mean[0].copy()))
            self.register_buffer("scale", torch.from_numpy(np.sqrt(moments.variance[0] + EPSILON)))
        action = saved.task.action
        self.is_discrete = action.kind != "gaussian"
        self.squash = saved.scenario.policy.squash
        space = saved.task.action_space
        self.shape = tuple(space.shape or ())
        self.is_integer = np.dtype(space.dtype).kind != "f"
        self.dtype = torch.from_numpy(np.zeros(1, space.dtype)).dtype
        # the format cannot hold empty tensors, so only the buffers of this kind of action are registered
        if self.is_discrete:
            self.register_buffer("start", torch.from_numpy(np.array(action.start, np.int64)))
        else:
            self.register_buffer("low", torch.from_numpy(np.array(action.low, np.float64)))
            self.register_buffer("high", torch.from_numpy(np.array(action.high, np.float64)))

    def forward(self, observations: Tensor) -> Tensor:
        """Compute the likeliest actions, [B, D] -> [B, ...]."""
        return self.choose(self.distribution(observations))

    def distribution(self, observations: Tensor) -> Tensor:
        """Compute the parameters of the action distribution, [B, D] -> [B, M]."""
        inputs = observations
        if self.is_normalised:
            inputs = ((inputs.double() - self.mean) / self.scale).clamp(-self.clip, self.clip).float()
        if self.module is not None and isinstance(self.policy, UserModulePolicy):
            outputs: Tensor = self.module(self.policy.in_own_shape(inputs))[0]
            return outputs
        parameters = {name: self.get_parameter(attribute) for name, attribute in self.names.items()}
        return self.policy.act(parameters, inputs[None])[0]

    def choose(self, distribution: Tensor) -> Tensor:
        """Return the likeliest actions as the environment takes them, [B, M] -> [B, ...]."""
        return self._action(self.policy.distribution.mode(distribution)).reshape(-1, *self.shape)

    def _action(self, likeliest: Tensor) -> Tensor:
        """Convert the policy's actions to the environment's, as `tasks.envs.ActionConverter` does."""
        if self.is_discrete:
            return (likeliest.long() + self.start).to(self.dtype)
        clipped = likeliest.double()
        if self.squash:
            clipped = torch.minimum(self.low + (clipped.tanh() + 1) / 2 * (self.high - self.low), self.high)
        else:
            clipped = torch.minimum(torch.maximum(clipped, self.low), self.high)
        return (clipped.round() if self.is_integer else clipped).to(self.dtype)


def example_observations(task: GymTask) -> Tensor:
    """Return two flat observations of zeros, of the type that the policy takes; with one an export fixes the batch."""
    return torch.zeros(2, task.observation_size, dtype=torch.uint8 if task.picture else torch.float32)


@final
class DistributionPredictor(nn.Module):
    """Computes the likeliest actions together with the parameters of the distribution that they are taken from.

    The outputs have the names `outputs`: `action` and `logits` [B, M] of choices, or `action`, `mean` [B, A] and
    `log_std` [B, A] of real numbers, as they are before the environment's bounds.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor
        self.outputs = ("action", "logits") if predictor.is_discrete else ("action", "mean", "log_std")

    def forward(self, observations: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs, [B, D] -> [B, ...] each."""
        distribution = self.predictor.distribution(observations)
        action = self.predictor.choose(distribution)
        if self.predictor.is_discrete:
            return action, distribution
        mean, log_std = distribution.chunk(2, -1)
        return action, mean, log_std
