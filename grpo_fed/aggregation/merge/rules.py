"""Binds a scenario's merge rule to the scenario's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from grpo_fed.aggregation.merge import (
    RULES,
    Merged,
)
from grpo_fed.aggregation.merge.custom import custom_rule
from grpo_fed.aggregation.merge.group_lasso import group_thresholds
from grpo_fed.aggregation.merge.mixing import with_mixing
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.settings import MergeSettings
from grpo_fed.scenario.tables import is_import_path

RULES_WITH_EVIDENCE = ("persistence", "clusters")
"""The rules that remember rounds, and so are no functions of replies, shared vector and groups alone."""


def check_rule(settings: MergeSettings, shared_blocks: SharedBlocks) -> None:
    """Check that a scenario's rule can be used; where nothing is shared, patterns of blocks are not checked.

    Raises a ValueError for a rule that cannot be imported, and for a pattern that matches no shared block or one that
    another pattern matches too.
    """
    if settings.rule not in RULES_WITH_EVIDENCE:
        bind_rule(settings)
    if shared_blocks.size:
        group_thresholds(shared_blocks.groups, 0.0, none_as_infinity(settings.blocks))


def bind_rule(settings: MergeSettings) -> Callable[..., Merged]:
    """Return the rule, with the mixing before it, as a function of replies, shared vector and groups.

    ValueError if it cannot be imported.
    """
    return with_mixing(_bind_keys(settings), settings.mix)


def _bind_keys(settings: MergeSettings) -> Callable[..., Merged]:
    """Bind a rule to its own keys."""
    threshold = float("inf") if settings.threshold is None else settings.threshold
    match settings.rule:
        case "huber":
            blocks = MappingProxyType(none_as_infinity(settings.blocks))
            return partial(RULES["huber"], threshold=threshold, blocks=blocks, refit=settings.refit)
        case "trimmed-mean":
            return partial(RULES["trimmed-mean"], fraction=settings.fraction)
        case "krum":
            return partial(RULES["krum"], byzantine=settings.byzantine, keep=settings.keep)
        case "multi-krum":
            return partial(RULES["multi-krum"], byzantine=settings.byzantine)
        case "centred-clipping":
            return partial(RULES["centred-clipping"], radius=settings.radius)
        case path if is_import_path(path):
            return custom_rule(settings)
        case rule:
            return RULES[rule]


def none_as_infinity(bounds: Mapping[str, float | None]) -> dict[str, float]:
    """Replace None, which means no limit, by infinity."""
    return {name: float("inf") if bound is None else bound for name, bound in bounds.items()}
