"""Finds contradictions of what bounds a client: targets for its entropy, a limit on its costs, rollbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_fed.scenario.language_checks import Contradiction

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

TARGET = ("objective", "entropy_target")


def constraint_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    """Find contradictions between constraints and other keys."""
    if scenario.objective.entropy_target is not None:
        yield from _entropy_mistakes(scenario)
    with_prompts = [number for number, client in enumerate(scenario.clients) if client.prompts is not None]
    for key, is_given in (
        (("objective", "cost", "limit"), scenario.objective.cost.limit is not None),
        (("trust", "rollback"), scenario.trust.rollback is not None),
    ):
        if is_given and with_prompts:
            text = "is for clients with env alone; leave it out, or the clients with prompts"
            yield text, (key, ("clients", with_prompts[0], "prompts"))


def _entropy_mistakes(scenario: Scenario) -> Iterator[Contradiction]:
    objective = scenario.objective
    target, groups = objective.entropy_target, objective.entropy_groups
    of_groups = target if isinstance(target, dict) else {}
    for name in of_groups:
        if name not in groups:
            text = f"objective.entropy_groups has no {name}; it has {' '.join(groups) if groups else 'none'}"
            yield text, ((*TARGET, name), ("objective", "entropy_groups"))
    if target == {}:
        yield "gives no set of objective.entropy_groups a target; leave it out", (TARGET,)
    if isinstance(target, dict) and any(client.prompts is not None for client in scenario.clients):
        yield "a token is an action of one component: give a client with prompts a number", (TARGET,)
    text = "is the weight that objective.entropy_target begins with; it must be 0 or more"
    if objective.entropy < 0:
        yield text, (("objective", "entropy"), TARGET)
    for number, client in enumerate(scenario.clients):
        if client.entropy is not None and client.entropy < 0:
            yield text, (("clients", number, "entropy"), TARGET)
    for name, weight in objective.entropy_weights.items():
        if name in of_groups and weight < 0:
            yield text, (("objective", "entropy_weights", name), TARGET)
