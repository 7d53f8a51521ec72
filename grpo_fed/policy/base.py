"""The interface of a policy.

A policy is the *shape* of a network; the parameters of all clients come as an argument, `{name: [K, *shape]}`, so that
one call serves one client or a thousand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import Distribution

Parameters = Mapping[str, Tensor]
Pullback = Callable[[Tensor, Tensor | None, Parameters], None]
"""Slopes by distribution parameters [K, B, M] and by values [K, B], or None; writes the gradient by every parameter."""
CriticPullback = Callable[[Tensor, Parameters], None]
"""Slopes by values [K, B]; writes the gradient by the parameters that only the critic uses, and no other."""


class Policy(ABC):
    """The shape of a network: its layout of parameters, and what it says about observations under given ones."""

    layout: Layout
    distribution: Distribution
    observation_size: int

    @abstractmethod
    def initial(self, seed: int) -> Tensor:
        """First parameters of one client, [P]; each tensor's draw depends on the seed, its name and its shape alone."""

    @abstractmethod
    def forward(self, parameters: Parameters, observations: Tensor) -> PolicyOutput:
        """Observations [K, B, D] -> Output."""

    @abstractmethod
    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """Observations [K, B, D] -> distribution parameters [K, B, M], without the critic."""

    @abstractmethod
    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """Observations [K, B, D] -> what the policy makes of them before it chooses, [K, B, F]."""

    @abstractmethod
    def actor_parameters(self) -> frozenset[str]:
        """Names of the parameters that the action distribution depends on."""

    @abstractmethod
    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """`act` for a rollout on the CPU, [K, B, D] -> [K, B, M], under parameters that may change in place."""

    @abstractmethod
    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[PolicyOutput, Pullback]:
        """`forward`, and the function that pulls the slopes of a loss by what it said back to the parameters.

        Without `critic` nobody asks for the values: they may be 0, and their slopes are None.
        """

    @abstractmethod
    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        """The values [K, B] alone, and their pullback to the parameters that the actor does not use."""


@dataclass(frozen=True)
class PolicyOutput:
    """What a policy says about observations."""

    distribution: Tensor
    """[K, B, M]: parameters of the action distribution."""
    values: Tensor
    """[K, B]: the critic's estimate of the discounted return."""
