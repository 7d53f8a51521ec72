"""Distributions over actions, as frozen data: what a policy's parameters mean.

Log-probabilities, entropies and divergences are written from logits, means and log standard deviations with as few
tensor operations as they need; what autograd would do on the hot path is there in closed form as well (`vjp`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

Array = TypeVar("Array", np.ndarray, Tensor)
Pullback = Callable[[Tensor, Tensor | None], Tensor]
"""Slopes by log_prob [...] and by entropy [..., C] or None -> slope by the parameters [..., M]."""

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
MASKED_LOGIT = -1e9
"""The logit of a choice that is not there: its probability is exactly 0, and no product with it is NaN."""
QUADRATURE = 32
"""Nodes of the Gauss-Hermite rule for the entropy behind tanh; its error is 1e-7 for a std of 1, 3e-3 for one of 3."""


class Distribution(ABC):
    """What an action is drawn from, given M parameters; an action is A floats in C components.

    Everything works on the last axis, whatever is in front of it; `sample` and `mode` take numpy arrays or tensors and
    give the same.
    """

    @property
    @abstractmethod
    def continuous(self) -> bool:
        """Whether an action is a point in space, or a choice."""

    @property
    @abstractmethod
    def parameter_size(self) -> int:
        """M."""

    @property
    @abstractmethod
    def action_size(self) -> int:
        """A."""

    @property
    @abstractmethod
    def components(self) -> int:
        """C: parts of an action that are independent of each other, and have an entropy each."""

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """Random numbers that one action is made from."""

    @abstractmethod
    def draw_noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Noise for as many actions, float32 [*shape, noise_size]."""

    @abstractmethod
    def sample(self, parameters: Array, noise: Array) -> Array:
        """Parameters [..., M] and noise [..., noise_size] -> actions [..., A]."""

    @abstractmethod
    def mode(self, parameters: Array) -> Array:
        """The likeliest actions, [..., M] -> [..., A]."""

    @abstractmethod
    def vjp(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None, Pullback]:
        """`evaluate`, and the function that pulls slopes back to the parameters, as in `jax.vjp`.

        [..., M], [..., A] -> [...], [..., C] (None if not wanted), pullback. The first two are differentiable as well;
        the pullback does what autograd would do with them, in fewer operations, and is not differentiable itself.
        """

    @abstractmethod
    def entropy(self, parameters: Tensor) -> Tensor:
        """Of each action component, [..., M] -> [..., C]."""

    @abstractmethod
    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p, q) between the distributions with parameters p and q, [..., M], [..., M] -> [...]."""

    def evaluate(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [...] and entropies [..., C] (None if not wanted) from one computation."""
        log_prob, entropies, _ = self.vjp(parameters, actions, entropy)
        return log_prob, entropies

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """[..., M], [..., A] -> [...]."""
        return self.evaluate(parameters, actions, False)[0]


class _Choice(Distribution):
    """What choices have in common: parameters are logits, an action is the place of each component's choice."""

    @property
    def continuous(self) -> bool:
        return False

    @property
    def components(self) -> int:
        return self.action_size

    @property
    def noise_size(self) -> int:
        return self.parameter_size

    def draw_noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel, made in float64 so that its tail does not end early."""
        exponential = np.maximum(generator.standard_exponential((*shape, self.noise_size)), 1e-300)
        return -np.log(exponential).astype(np.float32)

    def sample(self, parameters: Array, noise: Array) -> Array:
        """The greatest of logits plus Gumbel noise is at each place with its softmax probability (Gumbel-max)."""
        return self.mode(parameters + noise)


@final
@dataclass(frozen=True)
class Categorical(_Choice):
    """One of `count` choices; the parameters are their logits."""

    count: int

    @property
    def parameter_size(self) -> int:
        return self.count

    @property
    def action_size(self) -> int:
        return 1

    def mode(self, parameters: Array) -> Array:
        return _greatest(parameters)

    def vjp(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None, Pullback]:
        log_prob, entropies, back = _choice_vjp(parameters, actions.long(), entropy)

        def pullback(by_log_prob: Tensor, by_entropy: Tensor | None) -> Tensor:
            return back(by_log_prob.unsqueeze(-1), by_entropy)

        return log_prob.squeeze(-1), entropies, pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        return _choice_entropy(parameters)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return _choice_kl(p, q)


@final
@dataclass(frozen=True)
class MultiCategorical(_Choice):
    """One of `counts[c]` choices for each component c; the parameters are all their logits, one after the other."""

    counts: tuple[int, ...]

    @property
    def parameter_size(self) -> int:
        return sum(self.counts)

    @property
    def action_size(self) -> int:
        return len(self.counts)

    def mode(self, parameters: Array) -> Array:
        return _greatest(self._table(parameters))[..., 0]

    def vjp(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None, Pullback]:
        log_probs, entropies, back = _choice_vjp(self._table(parameters), actions.long().unsqueeze(-1), entropy)

        def pullback(by_log_prob: Tensor, by_entropy: Tensor | None) -> Tensor:
            by_entropy = None if by_entropy is None else by_entropy.unsqueeze(-1)
            table = back(by_log_prob[..., None, None].expand_as(log_probs), by_entropy).flatten(-2)
            return table if self._even else table[..., _places(self.counts, table.device)]

        return log_probs.sum((-2, -1)), None if entropies is None else entropies.squeeze(-1), pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        return _choice_entropy(self._table(parameters)).squeeze(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return _choice_kl(self._table(p), self._table(q)).sum(-1)

    @cached_property
    def _even(self) -> bool:
        return len(set(self.counts)) == 1

    def _table(self, parameters: Array) -> Array:
        """[..., M] -> [..., C, max(counts)], filled up with choices that are not there."""
        if self._even:
            return parameters.reshape(*parameters.shape[:-1], len(self.counts), self.counts[0])
        if isinstance(parameters, np.ndarray):
            nowhere = np.full((*parameters.shape[:-1], 1), MASKED_LOGIT, parameters.dtype)
            return np.concatenate((parameters, nowhere), -1)[..., _columns(self.counts)]
        return pad(parameters, (0, 1), value=MASKED_LOGIT)[..., _column_tensor(self.counts, parameters.device)]


@dataclass(frozen=True)
class _Normal(Distribution):
    """What Gaussians in `size` dimensions have in common: parameters are [means, log standard deviations]."""

    size: int

    @property
    def continuous(self) -> bool:
        return True

    @property
    def parameter_size(self) -> int:
        return 2 * self.size

    @property
    def action_size(self) -> int:
        return self.size

    @property
    def components(self) -> int:
        return self.size

    @property
    def noise_size(self) -> int:
        return self.size

    def draw_noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal."""
        return generator.standard_normal((*shape, self.size), np.float32)

    def sample(self, parameters: Array, noise: Array) -> Array:
        actions: Array = parameters[..., : self.size] + _exp(parameters[..., self.size :]) * noise
        return actions

    def mode(self, parameters: Array) -> Array:
        return parameters[..., : self.size]

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        (mean_p, log_p), (mean_q, log_q) = p.chunk(2, -1), q.chunk(2, -1)
        narrower = log_p - log_q
        distance = (mean_p - mean_q) * (-log_q).exp()
        return (0.5 * (torch.expm1(2 * narrower) + distance * distance) - narrower).sum(-1)


@final
@dataclass(frozen=True)
class Gaussian(_Normal):
    """A point in `size` dimensions, independent in each; clipping it to a box is the task's affair."""

    def vjp(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None, Pullback]:
        log_prob, _, log_std, back = _normal_vjp(parameters, actions)

        def pullback(by_log_prob: Tensor, by_entropy: Tensor | None) -> Tensor:
            by_mean, by_log_std = back(by_log_prob)
            return torch.cat((by_mean, by_log_std if by_entropy is None else by_log_std + by_entropy), -1)

        return log_prob, _normal_entropy(log_std) if entropy else None, pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        return _normal_entropy(parameters[..., self.size :])


@final
@dataclass(frozen=True)
class SquashedGaussian(_Normal):
    """tanh of a Gaussian point in `size` dimensions. An action is the value before tanh, which is applied last of all.

    The log-probability is that of tanh(action) (Haarnoja et al., 1801.01290, appendix C). tanh is one to one, so the KL
    is that of the Gaussians.
    """

    def vjp(self, parameters: Tensor, actions: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None, Pullback]:
        base, mean, log_std, back = _normal_vjp(parameters, actions)

        def pullback(by_log_prob: Tensor, by_entropy: Tensor | None) -> Tensor:
            by_mean, by_log_std = back(by_log_prob)
            if by_entropy is not None:
                slope_mean, slope_log_std = _squashed_entropy_slopes(mean, log_std)
                by_mean, by_log_std = by_mean + by_entropy * slope_mean, by_log_std + by_entropy * slope_log_std
            return torch.cat((by_mean, by_log_std), -1)

        log_prob = base - _log_slope_of_tanh(actions).sum(-1)
        return log_prob, _squashed_entropy(mean, log_std) if entropy else None, pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        return _squashed_entropy(*parameters.chunk(2, -1))


# Choices: logits on the last axis.


def _greatest(scores: Array) -> Array:
    """The place of the greatest score as a float, [..., n] -> [..., 1]."""
    place: Array = scores.argmax(-1)[..., None]
    if isinstance(place, np.ndarray):
        return place.astype(np.float32)
    return place.float()


def _choice_vjp(logits: Tensor, index: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None, Pullback]:
    """[..., n], [..., 1] -> log_prob [..., 1], entropy [..., 1], pullback of slopes [..., 1] each to [..., n]."""
    log_probs = logits.log_softmax(-1)

    def pullback(by_log_prob: Tensor, by_entropy: Tensor | None) -> Tensor:
        # d log p_i / dz_j = [i = j] - p_j and dH / dz_j = -p_j (log p_j + H)
        probs = log_probs.exp()
        if by_entropy is None:
            slope = probs * -by_log_prob
        else:
            minus_entropy = (probs * log_probs).sum(-1, keepdim=True)
            slope = (minus_entropy - log_probs).mul_(by_entropy).sub_(by_log_prob).mul_(probs)
        return slope.scatter_add_(-1, index, by_log_prob)

    return log_probs.gather(-1, index), _entropy_of(log_probs) if entropy else None, pullback


def _choice_entropy(logits: Tensor) -> Tensor:
    """[..., n] -> [..., 1]."""
    return _entropy_of(logits.log_softmax(-1))


def _entropy_of(log_probs: Tensor) -> Tensor:
    """[..., n] -> [..., 1]."""
    return -(log_probs.exp() * log_probs).sum(-1, keepdim=True)


def _choice_kl(p: Tensor, q: Tensor) -> Tensor:
    """[..., n], [..., n] -> [...]."""
    log_p = p.log_softmax(-1)
    return (log_p.exp() * (log_p - q.log_softmax(-1))).sum(-1)


@lru_cache
def _columns(counts: tuple[int, ...]) -> np.ndarray:
    """[C, max(counts)]: the parameter that belongs there, or the one past the last where none does."""
    places = np.arange(max(counts))
    starts = np.cumsum((0, *counts[:-1]))
    return np.where(places < np.array(counts)[:, None], starts[:, None] + places, sum(counts))


@lru_cache
def _column_tensor(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """`_columns` on a device."""
    return torch.from_numpy(_columns(counts)).to(device)


@lru_cache
def _places(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[M]: where each parameter stands in the flattened table."""
    return torch.from_numpy(np.flatnonzero(_columns(counts) < sum(counts))).to(device)


# Gaussians: means and log standard deviations side by side on the last axis.


def _exp(x: Array) -> Array:
    """Of each entry."""
    if isinstance(x, np.ndarray):
        raised: np.ndarray = np.exp(x)
        return raised
    return x.exp()


def _normal_vjp(
    parameters: Tensor, points: Tensor
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """log_prob [...], mean and log_std [..., A] each, and the pullback of a slope by log_prob to those two."""
    mean, log_std = parameters.chunk(2, -1)
    precision = (-log_std).exp()
    z = (points - mean) * precision
    log_prob = -points.shape[-1] * LOG_SQRT_2PI - torch.addcmul(log_std, z, z, value=0.5).sum(-1)

    def pullback(by_log_prob: Tensor) -> tuple[Tensor, Tensor]:
        # d log p / d mean = z / std and d log p / d log_std = z^2 - 1
        slope = by_log_prob.unsqueeze(-1)
        scaled = z * slope
        return scaled * precision, scaled * z - slope

    return log_prob, mean, log_std, pullback


def _normal_entropy(log_std: Tensor) -> Tensor:
    """[..., A] -> [..., A]."""
    return log_std + (LOG_SQRT_2PI + 0.5)


def _log_slope_of_tanh(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), without cancellation."""
    return 2 * math.log(2) - 2 * (u + softplus(-2 * u))


def _squashed_entropy(mean: Tensor, log_std: Tensor) -> Tensor:
    """Entropy of tanh(u), u normal: that of u plus E[log(1 - tanh(u)^2)] by Gauss-Hermite quadrature, [..., A]."""
    nodes, weights = _hermite(mean.dtype, mean.device)
    u = mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * nodes
    return _normal_entropy(log_std) + _log_slope_of_tanh(u) @ weights


def _squashed_entropy_slopes(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Of `_squashed_entropy` by mean and by log_std: d log(1 - tanh(u)^2) / du = -2 tanh(u)."""
    nodes, weights = _hermite(mean.dtype, mean.device)
    std = log_std.exp()
    bent = -2 * (mean.unsqueeze(-1) + std.unsqueeze(-1) * nodes).tanh()
    return bent @ weights, 1 + std * (bent @ (weights * nodes))


@lru_cache
def _hermite(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(x)] = sum w f(x) for a standard normal x."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE)
    return torch.from_numpy(nodes).to(device, dtype), torch.from_numpy(weights / weights.sum()).to(device, dtype)
