"""The interface of an action distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)
Pullback = Callable[[Tensor, Tensor | None], Tensor]
"""Gradients by log_prob [...] and by entropy [..., C], or None -> gradient by the parameters [..., M]."""


class Distribution(ABC):
    """A distribution with M parameters; an action is A floats in C components.

    All methods work on the last axis, with any axes before it. `sample` and `mode` take numpy arrays or tensors, and
    return the same.
    """

    @property
    @abstractmethod
    def continuous(self) -> bool:
        """Whether an action is a point in space; else it has choices."""

    @property
    @abstractmethod
    def parameter_size(self) -> int:
        """M, the number of distribution parameters."""

    @property
    def log_std_size(self) -> int:
        """How many of the M parameters, the last ones, are log standard deviations, which depend on no observation."""
        return 0

    @property
    def head_size(self) -> int:
        """How many of the M parameters, the first ones, a network computes from observations."""
        return self.parameter_size - self.log_std_size

    @property
    @abstractmethod
    def action_size(self) -> int:
        """A, the number of floats in an action."""

    @property
    @abstractmethod
    def components(self) -> int:
        """C, the number of independent parts of an action, each with an entropy of its own."""

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """The number of random numbers that one action is computed from."""

    @abstractmethod
    def draw_noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draw the noise for actions of a shape, float32 [*shape, noise_size]."""

    @abstractmethod
    def sample(self, parameters: Array, noise: Array) -> Array:
        """Compute actions [..., A] from parameters [..., M] and noise [..., noise_size]."""

    @abstractmethod
    def mode(self, parameters: Array) -> Array:
        """Return the most likely actions, [..., M] -> [..., A]."""

    @abstractmethod
    def vjp(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None, Pullback]:
        """Compute `evaluate` and its vector-Jacobian product, the pullback of gradients to the parameters.

        [..., M], [..., A] -> [...], [..., C] (None without `entropy`), pullback. The first two are differentiable too;
        the pullback computes what autograd would, in fewer operations, and is not differentiable itself.
        """

    @abstractmethod
    def entropy(self, parameters: Tensor) -> Tensor:
        """Compute the entropy of each action component, [..., M] -> [..., C]."""

    @abstractmethod
    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """Compute KL(p, q) between distributions with parameters p and q, [..., M], [..., M] -> [...]."""

    def evaluate(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
        """Compute log-probabilities [...] and entropies [..., C] (None without `entropy`) together."""
        log_prob, entropies, _ = self.vjp(parameters, actions, entropy)
        return log_prob, entropies

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """Compute log-probabilities of actions, [..., M], [..., A] -> [...]."""
        return self.evaluate(parameters, actions, False)[0]
