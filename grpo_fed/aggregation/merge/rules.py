"""The merge rule of a scenario, bound to the scenario's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from grpo_fed.aggregation.merge import (
    RULES,
    Merged,
)
from grpo_fed.aggregation.merge.custom import custom_rule
from grpo_fed.aggregation.merge.group_lasso import limits
from grpo_fed.policy.shared import Commons
from grpo_fed.scenario.settings import MergeSettings
from grpo_fed.scenario.tables import is_own


def check(settings: MergeSettings, commons: Commons) -> None:
    """ValueError for a rule that cannot be imported, and for patterns of blocks that take no shared block, or one
    twice; where nothing is shared these rest.
    """
    rule_of(settings)
    if commons.size:
        limits(commons.groups, 0.0, unlimited(settings.blocks))


def rule_of(settings: MergeSettings) -> Callable[..., Merged]:
    """The scenario's rule with the scenario's knobs."""
    threshold = float("inf") if settings.threshold is None else settings.threshold
    apart: dict[str, Any] = {"threshold": threshold, "blocks": MappingProxyType(unlimited(settings.blocks))}
    match settings.rule:
        case "huber":
            return partial(RULES["huber"], **apart, refit=settings.refit)
        case "trimmed-mean":
            return partial(RULES["trimmed-mean"], fraction=settings.fraction)
        case "krum":
            return partial(RULES["krum"], byzantine=settings.byzantine, keep=settings.keep)
        case "clusters":
            return partial(RULES["clusters"], **apart, structure=settings.structure, most=settings.most)
        case path if is_own(path):
            return custom_rule(settings)
        case rule:
            return RULES[rule]


def unlimited(bounds: Mapping[str, float | None]) -> dict[str, float]:
    """None, which is no limit, as infinity."""
    return {name: float("inf") if bound is None else bound for name, bound in bounds.items()}
