"""What a client's constraints do before an update: multipliers, and the critic of costs, adapt to what the batch shows.

K clients, C action components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.client_stack import ClientStack, ParameterStack
from grpo_fed.rl.minibatches import PackedBatch
from grpo_fed.rl.records import Batch, Episode
from grpo_fed.scenario.settings import CostSettings


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


def adapt_cost_multiplier(multiplier: Tensor, costs: Tensor, limit: float, rate: float) -> Tensor:
    """One step of projected dual ascent, [K], [K] -> [K]: max(0, multiplier + rate (mean cost - limit)).

    A client's multiplier stays where the mean cost of its episodes is unknown, NaN.
    """
    stepped = (multiplier + rate * (costs - limit)).clamp_min(0.0)
    return torch.where(costs.isnan(), multiplier, stepped)


def adapt_costs(
    multiplier: Tensor, episodes: Sequence[Sequence[Episode]], active: np.ndarray, settings: CostSettings
) -> None:
    """Adapt the active clients' multipliers [K], in place, to the mean cost of the episodes that finished in a batch.

    episodes: [K], those of each client. active: [K] bool.
    """
    assert settings.limit is not None, "costs have a limit"
    means = [
        float(np.mean([episode.cost for episode in of_client])) if of_client and is_active else math.nan
        for of_client, is_active in zip(episodes, active, strict=True)
    ]
    costs = torch.tensor(means).to(multiplier)
    multiplier.copy_(adapt_cost_multiplier(multiplier, costs, settings.limit, settings.rate))


def fit_cost_critic(
    stack: ClientStack,
    batch: Batch,
    targets: LearningTargets,
    active: Tensor | None,
    numbers: np.ndarray,
    learning_rate: np.ndarray,
) -> None:
    """Adam on the cost critic's squared error, in as many passes as the critic's; nothing without a cost critic.

    numbers, learning_rate: as in `update_clients`, and [K, 1].
    """
    if stack.cost_critic is None or targets.cost_returns is None:
        return
    settings = stack.scenario.objective
    epochs = settings.epochs if settings.step == "adam" else settings.value_epochs
    packed = PackedBatch.of(batch, replace(targets, returns=targets.cost_returns), None)
    for part in packed.minibatches(stack.seeds, numbers, epochs, settings.minibatches):
        stack.cost_critic.fit(part, learning_rate, active)
