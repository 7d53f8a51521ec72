"""Advantages: how much better than expected an action was, by a critic, or by the other episodes of a group.

K clients, T steps, N copies, E episodes of a client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_fed.rl.records import Batch
from grpo_fed.scenario.scenario import Scenario

Score = Literal["zscore", "centre", "rank", "leave-one-out"]
Average = Literal["step", "episode", "total"]

SAME = 1e-6
"""Returns of a group that differ by no more than this part of the greatest count as equal: that much is rounding."""


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, ends: Tensor, valid: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimates (1506.02438, eq. 16), [K, T, N] each; invalid steps get 0.

    A_t = delta_t + gamma lam A_t+1 with delta_t = r_t + gamma next_value_t - value_t, where no A_t+1 is added across an
    end or an invalid step. The recursion runs by doubling (Hillis & Steele 1986): after pass i every A_t reaches 2^i
    steps ahead, so log2(T) operations on whole tensors replace T on rows.
    """
    steps = rewards.shape[1]
    advantages = (rewards + gamma * next_values - values).masked_fill(~valid, 0.0)
    flows = (gamma * lam) * (valid & ~ends)[:, : steps - 1].to(advantages.dtype)
    reach = 1
    while reach < steps:
        near, far = advantages[:, : steps - reach], advantages[:, reach:]
        advantages = torch.cat((torch.addcmul(near, flows, far), advantages[:, steps - reach :]), 1)
        flows = flows[:, : max(steps - 2 * reach, 0)] * flows[:, reach:]
        reach *= 2
    return advantages


def episode_returns(rewards: Tensor, episodes: Tensor, valid: Tensor, gamma: float, count: int) -> Tensor:
    """The discounted return of each of `count` episodes, [K, T, N] each -> [K, count]; 0 without a valid step.

    The steps of an episode are those of one copy, in order; the first valid one is not discounted.

    episodes: [K, T, N] int64, the episode that a step belongs to.
    """
    where = torch.where(valid, episodes, count).flatten(1)
    rewards = rewards.masked_fill(~valid, 0.0)
    if gamma != 1.0:
        steps = valid.cumsum(1).flatten(1)
        first = steps.new_full((len(steps), count + 1), torch.iinfo(steps.dtype).max)
        first = first.scatter_reduce(1, where, steps, "amin")
        age = (steps - first.gather(1, where)).view_as(rewards)
        rewards = rewards * (gamma ** age.to(rewards.dtype)).masked_fill(~valid, 0.0)
    returns = rewards.new_zeros(len(rewards), count + 1)
    return returns.scatter_add_(1, where, rewards.flatten(1))[:, :count]


def group_advantages(returns: Tensor, groups: Tensor, score: Score) -> Tensor:
    """Score each episode's return against its group, [K, E], [K, E] int64 (-1: no such episode) -> [K, E].

    `zscore` is (R - mean) / std, the unbiased one (GRPO, 2402.03300); `centre` is R - mean (Dr. GRPO, 2503.20783);
    `leave-one-out` is R - mean of the others (RLOO, 2402.14740); `rank` is the part of the others that it beats minus
    the part that beats it, -1 to 1. A group of one and a group of equal returns get exactly 0.
    """
    real = groups >= 0
    returns = returns.masked_fill(~real, 0.0)
    if score == "rank":
        return _ranks(returns, groups, real)
    of_group = _reduction_over(groups, real)
    least, greatest = of_group(returns, "amin"), of_group(returns, "amax")
    count = of_group(torch.ones_like(returns), "sum")
    differ = real & _differ(least, greatest)
    above = returns - least  # exactly 0 where all are equal, and small enough to sum without loss
    centred = above - of_group(above, "sum") / count
    if score == "zscore":
        variance = of_group(centred * centred, "sum") / (count - 1).clamp_min(1)
        centred = centred / torch.where(differ, variance, 1.0).sqrt()
    elif score == "leave-one-out":
        centred = centred * count / (count - 1).clamp_min(1)
    return torch.where(differ, centred, 0.0)


def equal_groups(returns: Tensor, groups: Tensor) -> Tensor:
    """Find the episodes whose group has equal returns, so that their advantage is 0, [K, E] each -> [K, E] bool.

    groups: int64, -1 for no such episode, which is in no group. A group of one is equal.
    """
    real = groups >= 0
    returns = returns.masked_fill(~real, 0.0)
    of_group = _reduction_over(groups, real)
    return real & ~_differ(of_group(returns, "amin"), of_group(returns, "amax"))


def step_weights(episodes: Tensor, valid: Tensor, average: Average, longest: Tensor) -> Tensor:
    """Weights that make a sum over a client's steps an average, [K, T, N] each -> [K, T, N]; 0 for invalid steps.

    `step` is the mean over steps; `episode` the mean over episodes of the mean over their steps (GRPO, 2402.03300,
    eq. 3); `total` the sum over steps divided by the number of episodes times their greatest length, so that steps of
    long episodes count as much as those of short ones (Dr. GRPO, 2503.20783).

    longest: [K], the most steps that an episode may have.
    """
    real = valid.float()
    if average == "step":
        return real / real.sum((1, 2), keepdim=True).clamp_min(1)
    count = int(episodes.masked_fill(~valid, 0).max()) + 1
    where = torch.where(valid, episodes, count).flatten(1)
    lengths = real.new_zeros(len(real), count + 1).scatter_add_(1, where, real.flatten(1))
    number = (lengths > 0).sum(1).clamp_min(1)[:, None, None]
    if average == "total":
        return real / (number * longest[:, None, None])
    return real / (number * lengths.gather(1, where).view_as(real).clamp_min(1))


def _reduction_over(groups: Tensor, real: Tensor) -> Callable[[Tensor, str], Tensor]:
    """Make a function that gives each episode the reduction of its group's values, [K, E], "amin" -> [K, E]."""
    slots = int(groups.max()) + 2
    where = torch.where(real, groups, slots - 1)

    def of_group(values: Tensor, how: str) -> Tensor:
        table = values.new_zeros(len(values), slots)
        return table.scatter_reduce(1, where, values, how, include_self=False).gather(1, where)

    return of_group


def _ranks(returns: Tensor, groups: Tensor, real: Tensor) -> Tensor:
    """Wins minus losses against the others of the group, divided by their number, [K, E]."""
    others = (groups.unsqueeze(2) == groups.unsqueeze(1)) & real.unsqueeze(1)
    own, other = returns.unsqueeze(2), returns.unsqueeze(1)
    wins = (own - other).sign() * (others & _differ(own, other))
    return wins.sum(2) / (others.sum(2) - 1).clamp_min(1)


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether two returns differ by more than rounding."""
    return (a - b).abs() > SAME * torch.maximum(a.abs(), b.abs())


@dataclass(frozen=True)
class LearningTargets:
    """What a batch's steps are learned from, [K, T, N] each."""

    advantages: Tensor
    """How much better than expected each action was."""
    returns: Tensor
    """Targets of the critic."""
    weights: Tensor
    """Weight of each step in the mean; 0 for steps that must not be learned from."""
    cost_returns: Tensor | None = None
    """Targets of the cost critic; None without one."""


def learning_targets(
    batch: Batch, groups: Tensor | None, longest: Tensor, scenario: Scenario, price: Tensor | None = None
) -> LearningTargets:
    """Advantages, critic's targets and weights of a batch: by the critic, or each episode against its group.

    groups: [K, E] int64, the group of each episode, -1 for none; None with a critic.
    longest: [K], the most steps that an episode may have.
    price: [K], the multiplier of each client's costs; None where costs have no limit. What is normalised or scored is
        the sum of reward and cost at this price, so neither changes what a unit of cost is worth.
    """
    settings, learned, cost_returns = scenario.objective, batch.valid, None
    if settings.advantage == "gae":
        advantages = gae(
            batch.rewards,
            batch.values,
            batch.next_values,
            batch.ends,
            batch.valid,
            settings.gamma,
            settings.gae_lambda,
        )
        returns = advantages + batch.values
        if price is not None:
            assert batch.costs is not None
            assert batch.cost_values is not None
            assert batch.next_cost_values is not None
            of_costs = gae(
                batch.costs,
                batch.cost_values,
                batch.next_cost_values,
                batch.ends,
                batch.valid,
                settings.gamma,
                settings.gae_lambda,
            )
            cost_returns = of_costs + batch.cost_values
            advantages = with_costs(advantages, of_costs, price)
    else:
        assert groups is not None
        scores = episode_returns(batch.rewards, batch.episodes, batch.valid, settings.gamma, groups.shape[1])
        if price is not None:
            assert batch.costs is not None
            costs = episode_returns(batch.costs, batch.episodes, batch.valid, settings.gamma, groups.shape[1])
            scores = with_costs(scores, costs, price)
        of_episodes = group_advantages(scores, groups, scenario.group.score)
        of_steps = of_episodes.gather(1, batch.episodes.flatten(1))
        advantages = of_steps.view_as(batch.rewards) * batch.valid
        if scenario.group.equal != "keep":
            skipped = equal_groups(scores, groups).gather(1, batch.episodes.flatten(1))
            learned = learned & ~skipped.view_as(learned)
        returns = torch.zeros_like(advantages)
    weights = step_weights(batch.episodes, learned, settings.average, longest)
    if settings.normalise_advantages == "batch":
        advantages = normalise_advantages(advantages.flatten(1), weights.flatten(1)).view_as(advantages)
    return LearningTargets(advantages, returns, weights, cost_returns)


def with_costs(values: Tensor, costs: Tensor, price: Tensor) -> Tensor:
    """Value less cost at a price, (A - price C) / (1 + price), [K, ...], [K, ...], [K] -> [K, ...].

    The Lagrangian of PPO-Lagrangian (Ray, Achiam and Amodei 2019), whose scale stays that of the larger part however
    high the price is.
    """
    price = price.view(-1, *[1] * (values.ndim - 1))
    return (values - price * costs) / (1 + price)


def normalise_advantages(advantages: Tensor, weights: Tensor) -> Tensor:
    """Scale to mean 0 and standard deviation 1 under the weights, along the last axis, [..., B], [..., B] -> [..., B].

    The variance is the unbiased one for weights that sum to 1, sum w (a - m)^2 / (1 - sum w^2): with equal weights the
    usual division by n - 1. Equal advantages become 0, and so does a single one.
    """
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    centred = advantages - (shares * advantages).sum(-1, keepdim=True)
    shared = shares * centred
    variance = (shared * centred).sum(-1, keepdim=True)
    freedom = (1 - (shares * shares).sum(-1, keepdim=True)).clamp_min(1e-6)
    return centred / ((variance / freedom).sqrt() + 1e-8)
