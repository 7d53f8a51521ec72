"""A critic of costs: what a client's policy still costs from an observation on, for advantages of costs.

It is a network beside the policy and not a part of it: nothing of it is shared, sent or exported, a policy of the
user's own needs no second value, and a run without a limit on costs has none. K clients, P parameters of one network, B
observations of D entries.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from grpo_fed.policy.activations import ACTIVATIONS
from grpo_fed.policy.encoders import scale_pictures
from grpo_fed.rl.adam import Adam
from grpo_fed.rl.records import Minibatch
from grpo_fed.scenario.scenario import Scenario

ROLE = zlib.crc32(b"cost critic")
"""Distinguishes a critic's first parameters from others of the same seed."""


@dataclass(frozen=True, eq=False)
class CostCritic:
    """The critics of K clients, with as many units as the policy's hidden layers have."""

    sizes: tuple[int, ...]
    """Units of each layer from D to 1."""
    activation: str
    parameters: Tensor
    """[K, P]: changed in place."""
    adam: Adam
    max_grad_norm: float | None

    @classmethod
    def start(cls, scenario: Scenario, seeds: Sequence[int], observation_size: int, device: torch.device) -> Self:
        """Make the first critics: orthogonal weights, and a head of 0, so that nothing is expected to cost anything."""
        sizes = (observation_size, *scenario.policy.hidden, 1)
        parameters = torch.stack([_first_parameters(sizes, seed) for seed in seeds]).to(device)
        settings = scenario.objective
        adam = Adam.start(len(seeds), parameters.shape[1], settings.adam_epsilon, device)
        return cls(sizes, scenario.policy.activation, parameters, adam, settings.max_grad_norm)

    def rows(self, rows: slice) -> Self:
        """The critics of some clients, without a copy."""
        return replace(self, parameters=self.parameters[rows], adam=self.adam.rows(rows))

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """The discounted cost to come from observations on, [K, B, D] -> [K, B]."""
        return self._forward(self.parameters, observations)

    def fit(self, part: Minibatch, learning_rate: np.ndarray, active: Tensor | None) -> None:
        """Make a step of Adam on the weighted squared error from `part.returns`; learning_rate: [K, 1]."""
        leaf = self.parameters.detach().requires_grad_()
        error = self._forward(leaf, part.observations) - part.returns
        (gradient,) = torch.autograd.grad((error * error * part.weights).sum(), leaf)
        if self.max_grad_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.adam.step(self.parameters, gradient, learning_rate, active)

    def _forward(self, parameters: Tensor, observations: Tensor) -> Tensor:
        """Apply the layers, [K, P], [K, B, D] -> [K, B]."""
        activate, hidden, start = ACTIVATIONS[self.activation].forward, scale_pictures(observations), 0
        for inputs, outputs in pairwise(self.sizes):
            end = start + inputs * outputs
            weight = parameters[:, start:end].reshape(-1, inputs, outputs)
            bias, start = parameters[:, None, end : end + outputs], end + outputs
            output = torch.baddbmm(bias, hidden, weight)
            hidden = activate(output) if start < parameters.shape[1] else output
        return hidden.squeeze(-1)


def _first_parameters(sizes: Sequence[int], seed: int) -> Tensor:
    """The first parameters of one client's critic, [P]."""
    generator = torch.Generator().manual_seed(seed ^ ROLE)
    shapes = list(pairwise(sizes))
    parts = []
    for inputs, outputs in shapes[:-1]:
        weight = nn.init.orthogonal_(torch.empty(inputs, outputs), math.sqrt(2), generator=generator)
        parts += [weight.flatten(), torch.zeros(outputs)]
    return torch.cat([*parts, torch.zeros(shapes[-1][0] + 1)])
