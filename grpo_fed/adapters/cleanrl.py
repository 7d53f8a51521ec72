"""Agents in the style of CleanRL: modules with `get_action_and_value(observations, actions)`.

An agent with continuous actions has its distribution in two lines, since CleanRL gives it no function of its own:

    def distribution(observations):
        means = agent.actor_mean(observations)
        return Normal(means, agent.actor_logstd.exp().expand_as(means))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Categorical


class DiscreteAgent(Protocol):
    """An agent that chooses one of some actions."""

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return actions, their log probabilities [n], entropies, and values; sample actions if none are given."""
        ...


def discrete_distribution(agent: DiscreteAgent, actions: int) -> Callable[[Tensor], Categorical]:
    """Return an agent's policy over so many actions, by the log probability of each of them."""

    def distribution(observations: Tensor) -> Categorical:
        each = (torch.full((len(observations),), action) for action in range(actions))
        return Categorical(logits=torch.stack([agent.get_action_and_value(observations, a)[1] for a in each], 1))

    return distribution
