"""Keys that have no effect beside other values: those of the constraints that a client keeps.

It is a part of the table in unused_table.py, whose rows come first.
"""

from __future__ import annotations

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.unused_rows import Unused


def _has_one_target(scenario: Scenario) -> bool:
    return isinstance(scenario.objective.entropy_target, float)


CONSTRAINTS_UNUSED: tuple[Unused, ...] = (
    Unused(
        ("objective.entropy_rate",),
        lambda scenario: scenario.objective.entropy_target is None,
        "there is no objective.entropy_target, and weights of the entropy stay as they are",
    ),
    Unused(
        ("trust.rollback_episodes",),
        lambda scenario: scenario.trust.rollback is None,
        "trust.rollback = inf takes no update back",
    ),
    Unused(
        ("objective.cost.rate", "objective.cost.key"),
        lambda scenario: scenario.objective.cost.limit is None,
        "objective.cost.limit = inf limits no cost, and none is read",
    ),
    Unused(
        ("objective.entropy_groups", "objective.entropy_weights"),
        _has_one_target,
        "objective.entropy_target is a number, and the whole action has one weight",
    ),
)
"""The rows."""
