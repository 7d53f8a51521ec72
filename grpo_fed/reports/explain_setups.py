"""What a scenario starts from, what of it does not learn, and how it scales rewards, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grpo_fed.reports.formatting import list_names
from grpo_fed.scenario.scenario import Scenario


def explain_start(scenario: Scenario, frozen: Sequence[str]) -> Iterator[str]:
    """Explain what policies begin with, and which blocks do not learn."""
    if scenario.policy.start is not None:
        yield f"Policies begin with those of {scenario.policy.start}, and so do the shared blocks."
    for entry in scenario.clients:
        if entry.start is not None:
            yield f"What {entry.name} does not share begins with the policy of {entry.start}."
    if frozen:
        yield f"Frozen, so neither learned nor sent: {list_names(frozen)}."


def explain_rewards(scenario: Scenario) -> Iterator[str]:
    """Explain what is done to rewards before clients learn from them."""
    rollout = scenario.rollout
    scales = {rollout.reward_scale if entry.reward_scale is None else entry.reward_scale for entry in scenario.clients}
    if scenario.unit == "completions":
        return
    if scales != {1.0}:
        low, high = min(scales), max(scales)
        by_client = f"{low:g}" if low == high else f"{low:g} to {high:g} (by client)"
        yield f"Rewards are multiplied by {by_client} to learn from; returns are reported as they were."
    if rollout.reward_clip is not None:
        yield f"Rewards are clipped to +-{rollout.reward_clip:g} to learn from."
