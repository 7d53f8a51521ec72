"""What a client's constraints do before an update: multipliers adapt to what the batch shows.

K clients, C action components.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.rl.client_stack import ParameterStack
from grpo_fed.rl.records import Batch


def adapt_entropy(
    stack: ParameterStack, measure: Callable[[], Tensor], active: Tensor | None = None
) -> dict[str, Tensor]:
    """Adapt the active clients' weights of entropies that have a target; gives these metrics, [K] by key.

    measure: gives the mean entropy of each action component, [K, C], under the policy that collected the batch.
    """
    targets = stack.entropy_targets
    if targets is None:
        return {}
    entropies = measure()
    adapted = targets.adapt(stack.entropy, entropies, stack.scenario.objective.entropy_rate)
    stack.entropy.copy_(adapted if active is None else torch.where(active[:, None], adapted, stack.entropy))
    return targets.metrics(stack.entropy, entropies)


def mean_entropies(policy: StackedPolicy, batch: Batch) -> Tensor:
    """The mean entropy of each action component over a batch's valid steps, [K, C]; NaN without a valid step."""
    entropies = policy.distribution.entropy(batch.distribution)
    weights = batch.valid.to(entropies.dtype)
    return (entropies * weights.unsqueeze(-1)).sum((1, 2)) / weights.sum((1, 2)).unsqueeze(-1)
