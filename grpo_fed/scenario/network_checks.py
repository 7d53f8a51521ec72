"""Finds contradictions between the kind of network, its memory, and how it learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_fed.scenario.language_checks import Contradiction

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario


def network_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    """Find what is wrong with networks of ours, in words, and the keys that it concerns."""
    policy, objective, copies = scenario.policy, scenario.objective, scenario.rollout.num_envs
    if policy.module is not None or all(client.env is None for client in scenario.clients):
        return
    if policy.adapter and policy.kind == "cnn":
        text = "a network for pictures begins with its encoder; leave policy.adapter out"
        yield text, (("policy", "adapter"), ("policy", "kind"))
    if policy.memory == "none":
        return
    if policy.kind == "cnn":
        text = (
            "a network for pictures has no memory: show it some frames at once, as"
            ' gymnasium.wrappers:FrameStackObservation does, or use policy.kind = "mlp"'
        )
        yield text, (("policy", "memory"), ("policy", "kind"))
    if objective.minibatches > copies and (objective.step == "adam" or objective.advantage == "gae"):
        text = (
            f"with policy.memory a minibatch is whole sequences, one of each of rollout.num_envs = {copies} copies:"
            f" objective.minibatches = {objective.minibatches} must be at most {copies}"
        )
        keys = (("objective", "minibatches"), ("rollout", "num_envs"), ("policy", "memory"))
        yield text, keys
