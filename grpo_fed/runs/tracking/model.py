"""A client's policy as a torch module that stands alone: flat observations in, the environment's actions out."""

from __future__ import annotations

import copy
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from grpo_fed.policy.user_module import UserModulePolicy
from grpo_fed.rl.normalise import EPSILON
from grpo_fed.runs.policies import LoadedPolicy


@final
class Predictor(nn.Module):
    """[B, D] float32 observations, as the environment gives them but flat -> [B, ...] the likeliest actions.

    In operations that `torch.export` understands, so that it can be written down and read without our code.
    """

    mean: Tensor
    scale: Tensor
    start: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, saved: LoadedPolicy) -> None:
        super().__init__()
        self.policy = saved.policy
        self.names = {name: name.replace(".", "__") for name in saved.policy.layout.views(saved.parameters)}
        views = saved.policy.layout.views(saved.parameters)
        self.own: nn.Module | None = None
        if isinstance(saved.policy, UserModulePolicy):
            self.own = copy.deepcopy(saved.policy.template)
            self.own.load_state_dict({name: value[0] for name, value in views.items()})
        else:
            for name, value in views.items():
                self.register_parameter(self.names[name], nn.Parameter(value.clone(), requires_grad=False))
        self.normalises = saved.normaliser is not None
        if saved.normaliser is not None:
            moments = saved.normaliser.moments
            self.clip = saved.normaliser.clip
            self.register_buffer("mean", torch.from_numpy(moments.mean[0].copy()))
            self.register_buffer("scale", torch.from_numpy(np.sqrt(moments.variance[0] + EPSILON)))
        action = saved.task.action
        self.chooses = action.kind != "gaussian"
        self.squash = saved.scenario.policy.squash
        space = saved.task.action_space
        self.shape = tuple(space.shape or ())
        self.whole = np.dtype(space.dtype).kind != "f"
        self.dtype = torch.from_numpy(np.zeros(1, space.dtype)).dtype
        # the format cannot hold empty tensors, so there is only what the kind of action needs
        if self.chooses:
            self.register_buffer("start", torch.from_numpy(np.array(action.start, np.int64)))
        else:
            self.register_buffer("low", torch.from_numpy(np.array(action.low, np.float64)))
            self.register_buffer("high", torch.from_numpy(np.array(action.high, np.float64)))

    def forward(self, observations: Tensor) -> Tensor:
        seen = observations
        if self.normalises:
            seen = ((seen.double() - self.mean) / self.scale).clamp(-self.clip, self.clip).float()
        likeliest = self.policy.distribution.mode(self._said(seen))
        return self._action(likeliest).reshape(-1, *self.shape)

    def _said(self, seen: Tensor) -> Tensor:
        """[B, D] -> [B, M]."""
        if self.own is not None:
            said: Tensor = self.own(seen)[0]
            return said
        parameters = {name: self.get_parameter(own) for name, own in self.names.items()}
        return self.policy.act(parameters, seen[None])[0]

    def _action(self, likeliest: Tensor) -> Tensor:
        """As `lanes.convert.Actions`."""
        if self.chooses:
            return (likeliest.long() + self.start).to(self.dtype)
        inside = likeliest.double()
        if self.squash:
            inside = torch.minimum(self.low + (inside.tanh() + 1) / 2 * (self.high - self.low), self.high)
        else:
            inside = torch.minimum(torch.maximum(inside, self.low), self.high)
        return (inside.round() if self.whole else inside).to(self.dtype)
