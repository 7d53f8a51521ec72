"""Defaults that follow from other values of a scenario."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from grpo_fed.scenario.settings import RULES_WITH_THRESHOLD, MergeSettings

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario

ABSURD = 1e12
"""Larger than any learning rate or number of steps that a run could use."""


def default_merge_threshold(scenario: Scenario) -> float:
    """Compute a `merge.threshold` that clients do not exceed by chance: 0.02, or more where the clients learn fast.

    In U steps of Adam whose signs are random, a parameter moves by about learning_rate sqrt(U), and two clients move
    apart by sqrt(2) times that. There is no such estimate for other steps, nor for `advantage = "group"`, where the
    number of updates depends on the lengths of the episodes. Steps for private blocks or a second policy are counted.
    """
    least = float(MergeSettings.model_fields["threshold"].default)
    objective, rollout = scenario.objective, scenario.rollout
    uses_adam = objective.advantage == "gae" and objective.step == "adam"
    if scenario.merge.rule not in RULES_WITH_THRESHOLD or not uses_adam:
        return least
    updates = -(-scenario.steps // (rollout.num_envs * rollout.horizon))
    adam_steps = updates * objective.epochs * objective.minibatches
    own_rates = [client.learning_rate for client in scenario.clients if client.learning_rate is not None]
    rate = max([objective.learning_rate, *own_rates])
    if max(rate, adam_steps) > ABSURD:
        return least
    return max(least, float(f"{rate * math.sqrt(2 * adam_steps):.2g}"))
