"""Clients that work against the others, to try merges on: `wrappers = ["grpo_fed.tasks.wrappers:NegatedReward"]`."""

from __future__ import annotations

from typing import Any, SupportsFloat, final

import gymnasium


@final
class NegatedReward(gymnasium.RewardWrapper[Any, Any]):
    """Whoever learns here learns to do as badly as can be."""

    def reward(self, reward: SupportsFloat) -> SupportsFloat:
        return -float(reward)
