"""From a Batch to what an update needs: the advantage and the weight of every step, and what the critic should say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fed.rl.advantages import episode_returns, gae, group_advantages, step_weights
from grpo_fed.rl.objective import normalise
from grpo_fed.rl.records import Batch
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True)
class Judged:
    """A batch's steps as they are learned from, [K, T, N] each."""

    advantages: Tensor
    """How much better than expected."""
    returns: Tensor
    """What the critic should say."""
    weights: Tensor
    """Of a step in the mean; 0 where it must not be learned from."""


def judge(batch: Batch, groups: Tensor | None, longest: Tensor, scenario: Scenario) -> Judged:
    """By the critic, or each episode against its group: groups [K, E] int64 names the group of each, -1 for none.

    `longest` [K] is how many steps an episode may have, for `average = "total"`.
    """
    settings = scenario.objective
    weights = step_weights(batch.episodes, batch.valid, settings.average, longest)
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
    else:
        assert groups is not None
        found = episode_returns(batch.rewards, batch.episodes, batch.valid, settings.gamma, groups.shape[1])
        judged = group_advantages(found, groups, scenario.group.score)
        every = batch.episodes.flatten(1)
        advantages = judged.gather(1, every).view_as(batch.rewards) * batch.valid
        returns = torch.zeros_like(advantages)
    if settings.normalise_advantages == "batch":
        advantages = normalise(advantages.flatten(1), weights.flatten(1)).view_as(advantages)
    return Judged(advantages, returns, weights)
