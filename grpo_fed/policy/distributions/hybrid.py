"""Choices together with real numbers: two independent distributions side by side, for actions that are both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.distributions.base import Array, Distribution, Pullback
from grpo_fed.policy.distributions.choices import MultiCategorical
from grpo_fed.policy.distributions.gaussians import Gaussian, SquashedGaussian


@final
@dataclass(frozen=True)
class Hybrid(Distribution):
    """Choices and a point in space, independent given the observation: log-probabilities, entropies and KLs add up.

    Parameters are the logits of the choices, then means, then log standard deviations. An action has the index of each
    choice, then the real numbers.
    """

    choices: MultiCategorical
    point: Gaussian | SquashedGaussian

    @property
    def continuous(self) -> bool:
        return False

    @property
    def log_std_size(self) -> int:
        return self.point.log_std_size

    @property
    def parameter_size(self) -> int:
        return self.choices.parameter_size + self.point.parameter_size

    @property
    def action_size(self) -> int:
        return self.choices.action_size + self.point.action_size

    @property
    def components(self) -> int:
        return self.choices.components + self.point.components

    @property
    def noise_size(self) -> int:
        return self.choices.noise_size + self.point.noise_size

    def draw_noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draw the noise of the choices, then that of the point."""
        parts = [part.draw_noise(generator, shape) for part in (self.choices, self.point)]
        return np.concatenate(parts, -1)

    def sample(self, parameters: Array, noise: Array) -> Array:
        logits, moments = self._split(parameters)
        cut = self.choices.noise_size
        return _join(self.choices.sample(logits, noise[..., :cut]), self.point.sample(moments, noise[..., cut:]))

    def mode(self, parameters: Array) -> Array:
        logits, moments = self._split(parameters)
        return _join(self.choices.mode(logits), self.point.mode(moments))

    def vjp(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None, Pullback]:
        logits, moments = self._split(parameters)
        cut = self.choices.action_size
        of_choices, choices_entropy, choices_back = self.choices.vjp(logits, actions[..., :cut], entropy)
        of_point, point_entropy, point_back = self.point.vjp(moments, actions[..., cut:], entropy)

        def pullback(by_log_prob: Tensor, by_entropy: Tensor | None) -> Tensor:
            by_choices = None if by_entropy is None else by_entropy[..., :cut]
            by_point = None if by_entropy is None else by_entropy[..., cut:]
            return torch.cat((choices_back(by_log_prob, by_choices), point_back(by_log_prob, by_point)), -1)

        entropies = None
        if choices_entropy is not None and point_entropy is not None:
            entropies = torch.cat((choices_entropy, point_entropy), -1)
        return of_choices + of_point, entropies, pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        logits, moments = self._split(parameters)
        return torch.cat((self.choices.entropy(logits), self.point.entropy(moments)), -1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        (logits_p, moments_p), (logits_q, moments_q) = self._split(p), self._split(q)
        return self.choices.kl(logits_p, logits_q) + self.point.kl(moments_p, moments_q)

    def _split(self, parameters: Array) -> tuple[Array, Array]:
        """Return the logits of the choices, and the moments of the point."""
        cut = self.choices.parameter_size
        return parameters[..., :cut], parameters[..., cut:]


def _join(choices: Array, point: Array) -> Array:
    """Put choices and real numbers side by side."""
    if isinstance(choices, np.ndarray):
        joined: np.ndarray = np.concatenate((choices, point), -1)
        return joined
    return torch.cat((choices, point), -1)
