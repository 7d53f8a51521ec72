"""Records that travel between the parts of the library: frozen, and every field says its shape.

K clients of a fleet, T steps, N copies of the task, D observation entries, A action entries, M distribution parameters,
C action components, P parameters of one policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a fleet lived through between two updates."""

    observations: Tensor
    """[K, T, N, D]: as the policy saw them."""
    actions: Tensor
    """[K, T, N, A]: as sampled, before clipping or squashing; a discrete action is a float that holds an integer."""
    log_probs: Tensor
    """[K, T, N]: of the actions under the policy that took them."""
    distribution: Tensor
    """[K, T, N, M]: of that policy."""
    values: Tensor
    """[K, T, N]: of the observations; 0 where no critic judges."""
    next_values: Tensor
    """[K, T, N]: of what the action led to; 0 where terminated, and where no critic judges."""
    rewards: Tensor
    """[K, T, N]: as learned from (normalised if the scenario says so)."""
    ends: Tensor
    """[K, T, N] bool: terminated or truncated: nothing flows back across it."""
    valid: Tensor
    """[K, T, N] bool: False for what must not be learned from."""
    episodes: Tensor
    """[K, T, N] int64: which of the client's episodes in this batch a step belongs to, from 0."""


@dataclass(frozen=True)
class Minibatch:
    """A part of a batch with what the objective needs, [K, B, ...]."""

    observations: Tensor
    """[K, B, D]."""
    actions: Tensor
    """[K, B, A]."""
    log_probs: Tensor
    """[K, B]: under the policy that acted."""
    distribution: Tensor
    """[K, B, M]: of the policy that the KL is measured from."""
    advantages: Tensor
    """[K, B]."""
    returns: Tensor
    """[K, B]: what the critic should say."""
    values: Tensor
    """[K, B]: what the critic said."""
    weights: Tensor
    """[K, B]: of a step in the mean; 0 for what must not be learned from."""
