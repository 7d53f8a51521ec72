"""The interfaces of a policy.

A policy is the *shape* of a network, without parameters. The parameters of K clients come as an argument, by name and
with the client as their first axis, `{name: [K, *shape]}`, so that one call serves one client or a thousand.

`Policy` is what a federation and a merge need of any kind of policy: names, blocks, and values to begin with.
`StackedPolicy` adds what `StackedLearner` needs to train K clients as one computation: action distributions, the
critic, the features and the gradients.
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
"""Tensors by name, [K, *shape]."""
Pullback = Callable[[Tensor, Tensor | None, Parameters], None]
"""Takes the gradients of a loss by distribution parameters [K, B, M] and by values [K, B], or None; writes the gradient
by every parameter into its third argument."""
CriticPullback = Callable[[Tensor, Parameters], None]
"""Takes the gradient of a loss by values [K, B]; writes the gradient by the parameters that only the critic uses, and
leaves all others as they are."""


class Policy(ABC):
    """The layout of a network's parameters, and their initial values."""

    layout: Layout
    """Where each parameter lies among the P columns of the flat parameters."""

    @abstractmethod
    def initial(self, seed: int) -> Tensor:
        """Return the initial parameters of one client, [P].

        Each tensor's values depend on the seed, its name and its shape alone, so clients with the same seed begin with
        the same shared blocks.
        """

    @abstractmethod
    def chain_of(self, parameter: str) -> str:
        """Name the chain of layers that a parameter lies in.

        The layers of a chain follow each other from input to output, in the order of the layout; a parameter whose
        place is unknown is a chain of its own.
        """


class StackedPolicy(Policy):
    """A policy that the stacked learner can train: it maps observations to action distributions, and has a critic."""

    distribution: Distribution
    """What actions are sampled from, given M distribution parameters."""
    observation_size: int
    """D, the number of entries in a flattened observation."""
    memory_size: int = 0
    """H, the numbers that the policy remembers from step to step; 0 for a policy without memory."""

    @property
    def input_size(self) -> int:
        """The entries of what the policy sees: an observation and, of one with memory, this and a mark [D + H + 1]."""
        return self.observation_size + (self.memory_size + 1 if self.memory_size else 0)

    @abstractmethod
    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """Compute distribution parameters [K, B, M] from observations [K, B, D], without the critic."""

    @abstractmethod
    def forward(self, parameters: Parameters, observations: Tensor) -> PolicyOutput:
        """Compute action distributions and values from observations [K, B, D]."""

    @abstractmethod
    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """Compute from observations [K, B, D] the features that the actor's head reads, [K, B, F]."""

    @abstractmethod
    def actor_parameters(self) -> frozenset[str]:
        """Return the names of the parameters that the action distribution depends on."""

    @abstractmethod
    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """Return `act` as a function of arrays, [K, B, D] -> [K, B, M], for rollouts on the CPU.

        parameters: may change in place between two calls of the function, which uses their new values.
        """

    @abstractmethod
    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[PolicyOutput, Pullback]:
        """Compute `forward` and its vector-Jacobian product: the pullback of a loss's gradients to the parameters.

        critic: False where values are not needed; they may then be 0, and the pullback's gradient by them is None.
        """

    @abstractmethod
    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        """Compute the values [K, B] alone, and their pullback to the parameters that the actor does not use."""


@dataclass(frozen=True)
class PolicyOutput:
    """The output of a policy for B observations of each of K clients."""

    distribution: Tensor
    """[K, B, M]: parameters of the action distribution."""
    values: Tensor
    """[K, B]: the critic's estimate of the discounted return."""
