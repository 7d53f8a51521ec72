"""What a scenario starts from, what of it does not learn, and how it scales rewards, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grpo_fed.reports.formatting import format_count, list_names
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


def explain_adaptation(scenario: Scenario) -> Iterator[str]:
    """Explain which clients take no part in training, and what adapts to its task in evaluations."""
    held_out, updates = [entry for entry in scenario.clients if not entry.trains], scenario.evaluate.adapt
    if held_out:
        count = format_count(sum(entry.count for entry in held_out), "client")
        names = list_names([entry.name for entry in held_out])
        yield (
            f"{count} of {names} {'takes' if count == '1 client' else 'take'} no part in training, and no score counts"
            " them: each evaluation begins with the shared blocks as they are."
        )
    if updates:
        batch = scenario.rollout.num_envs * scenario.rollout.horizon
        steps = f" on {batch:,} steps of its own each" if scenario.unit == "steps" else " on a batch of its own each"
        yield (
            f"In an evaluation with the likeliest actions each client makes {format_count(updates, 'local update')}"
            f"{steps} on a copy of its policy, and is evaluated after each; nothing else depends on them."
        )


def explain_twins(scenario: Scenario) -> Iterator[str]:
    """Explain how clients find out whether sharing pays for them."""
    if scenario.evaluate.twins:
        yield (
            f"Each client also trains a twin on {scenario.steps:,} {scenario.unit} of its own a round, which begins as"
            " it does and shares nothing; their returns in training say whether sharing pays for the client."
        )


def explain_optimiser(scenario: Scenario) -> Iterator[str]:
    """Explain how the server steps towards the merge, and what clients add to their own steps."""
    merge, inner_rate = scenario.merge, scenario.personal.inner_rate
    if not scenario.policy.shared:
        return
    if merge.optimiser != "sgd" or merge.rate != 1:
        how = {
            "sgd": f"The server goes {merge.rate:g} times the way to it",
            "momentum": f"The server steps towards it with momentum {merge.momentum:g} and rate {merge.rate:g}",
            "adam": f"The server steps towards it by Adam with rate {merge.rate:g}",
        }[merge.optimiser]
        yield f"{how}; KL budgets limit this step."
    if merge.correct_drift:
        yield "Each client adds to its steps what all clients' mean step in the last round had more than its own."
    if inner_rate:
        yield (
            f"Every second minibatch gives an inner step of {inner_rate:g} times its gradient, and the next one the"
            " gradient there, by which the client moves from before that step."
        )


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
