"""Choices of one or several discrete components, given as logits on the last axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo_fed.policy.distributions.base import Array, Distribution, Pullback

MASKED_LOGIT = -1e9
"""The logit of a choice that does not exist: its probability is exactly 0, and no product with it is NaN."""


class _Choice(Distribution):
    """The common part of choices: parameters are logits, and an action is the index of each component's choice."""

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
        """Draw standard Gumbel noise, computed in float64 so that its tail does not end early."""
        exponential = np.maximum(generator.standard_exponential((*shape, self.noise_size)), 1e-300)
        return -np.log(exponential).astype(np.float32)

    def sample(self, parameters: Array, noise: Array) -> Array:
        """Take the greatest of logits plus Gumbel noise: each choice with its softmax probability (Gumbel-max)."""
        return self.mode(parameters + noise)


@final
@dataclass(frozen=True)
class Categorical(_Choice):
    """A choice of one of `count`; the parameters are their logits."""

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
    """A choice of one of `counts[c]` for each component c; the parameters are the components' logits, concatenated."""

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
            return table if self._even else table[..., _table_indices(self.counts, table.device)]

        return log_probs.sum((-2, -1)), None if entropies is None else entropies.squeeze(-1), pullback

    def entropy(self, parameters: Tensor) -> Tensor:
        return _choice_entropy(self._table(parameters)).squeeze(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return _choice_kl(self._table(p), self._table(q)).sum(-1)

    @cached_property
    def _even(self) -> bool:
        return len(set(self.counts)) == 1

    def _table(self, parameters: Array) -> Array:
        """Reshape logits [..., M] to [..., C, max(counts)], padded with choices that do not exist."""
        if self._even:
            return parameters.reshape(*parameters.shape[:-1], len(self.counts), self.counts[0])
        if isinstance(parameters, np.ndarray):
            masked = np.full((*parameters.shape[:-1], 1), MASKED_LOGIT, parameters.dtype)
            return np.concatenate((parameters, masked), -1)[..., _columns(self.counts)]
        return pad(parameters, (0, 1), value=MASKED_LOGIT)[..., _column_tensor(self.counts, parameters.device)]


def _greatest(scores: Array) -> Array:
    """Return the index of the greatest score as a float, [..., n] -> [..., 1]."""
    index: Array = scores.argmax(-1)[..., None]
    if isinstance(index, np.ndarray):
        return index.astype(np.float32)
    return index.float()


def _choice_vjp(logits: Tensor, index: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None, Pullback]:
    """Compute log_prob [..., 1], entropy [..., 1] and their pullback to the logits, from [..., n] and [..., 1]."""
    log_probs = logits.log_softmax(-1)

    def pullback(by_log_prob: Tensor, by_entropy: Tensor | None) -> Tensor:
        # d log p_i / dz_j = [i = j] - p_j and dH / dz_j = -p_j (log p_j + H)
        probs = log_probs.exp()
        if by_entropy is None:
            by_logits = probs * -by_log_prob
        else:
            minus_entropy = (probs * log_probs).sum(-1, keepdim=True)
            by_logits = (minus_entropy - log_probs).mul_(by_entropy).sub_(by_log_prob).mul_(probs)
        return by_logits.scatter_add_(-1, index, by_log_prob)

    return log_probs.gather(-1, index), _entropy_from_log_probs(log_probs) if entropy else None, pullback


def _choice_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of a choice by its logits, [..., n] -> [..., 1]."""
    return _entropy_from_log_probs(logits.log_softmax(-1))


def _entropy_from_log_probs(log_probs: Tensor) -> Tensor:
    """Compute the entropy of a choice by its log-probabilities, [..., n] -> [..., 1]."""
    return -(log_probs.exp() * log_probs).sum(-1, keepdim=True)


def _choice_kl(p: Tensor, q: Tensor) -> Tensor:
    """Compute KL(p, q) of choices by their logits, [..., n], [..., n] -> [...]."""
    log_p = p.log_softmax(-1)
    return (log_p.exp() * (log_p - q.log_softmax(-1))).sum(-1)


@lru_cache
def _columns(counts: tuple[int, ...]) -> np.ndarray:
    """Return the index of the parameter for each entry of the padded table, [C, max(counts)]; M where it has none."""
    choices = np.arange(max(counts))
    starts = np.cumsum((0, *counts[:-1]))
    return np.where(choices < np.array(counts)[:, None], starts[:, None] + choices, sum(counts))


@lru_cache
def _column_tensor(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return `_columns` as a tensor on a device."""
    return torch.from_numpy(_columns(counts)).to(device)


@lru_cache
def _table_indices(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the index of each parameter in the flattened table, [M]."""
    return torch.from_numpy(np.flatnonzero(_columns(counts) < sum(counts))).to(device)
