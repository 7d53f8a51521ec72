"""A client's policy as a torch module without our code: flat observations in, the environment's actions out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from grpo_fed.policy.user_module import UserModulePolicy
from grpo_fed.rl.normalise import EPSILON
from grpo_fed.runs.policies import LoadedPolicy, load_network


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
        """Copy the network, the normaliser's moments and the action space of a client's policy."""
        super().__init__()
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
        inputs = observations
        if self.is_normalised:
            inputs = ((inputs.double() - self.mean) / self.scale).clamp(-self.clip, self.clip).float()
        likeliest = self.policy.distribution.mode(self._outputs(inputs))
        return self._action(likeliest).reshape(-1, *self.shape)

    def _outputs(self, inputs: Tensor) -> Tensor:
        """Compute the parameters of the action distribution, [B, D] -> [B, M]."""
        if self.module is not None and isinstance(self.policy, UserModulePolicy):
            outputs: Tensor = self.module(self.policy.in_own_shape(inputs))[0]
            return outputs
        parameters = {name: self.get_parameter(attribute) for name, attribute in self.names.items()}
        return self.policy.act(parameters, inputs[None])[0]

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


def export_policy(folder: Path, client: str, path: Path) -> None:
    """Save a client's policy of a run as an MLflow model, in PyTorch's exported form.

    The form holds no pickle and needs none of our code. Whatever a user's module raises is raised from here.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    saved = load_network(folder, client)
    if saved.policy.memory_size:
        raise ValueError("a policy with memory is no function of an observation; use grpo_fed.load_policy")
    policy = Predictor(saved).eval()
    pixels = torch.uint8 if saved.task.picture else torch.float32
    example = torch.zeros(2, saved.task.observation_size, dtype=pixels)  # the export would fix a batch size of 1
    with torch.no_grad():
        signature = infer_signature(example.numpy(), policy(example).numpy())
    mlflow.pytorch.save_model(
        policy,
        str(path),
        input_example=example.numpy(),
        signature=signature,
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
    )
