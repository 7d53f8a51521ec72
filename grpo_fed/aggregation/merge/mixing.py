"""Nearest-neighbour mixing (Allouah et al. 2023, 2302.01772), a step before any merge rule.

A hostile client that stays close to the others moves a robust rule because honest clients differ from each other.
Mixing takes most of this difference away: honest replies become nearly alike, and a hostile one is averaged with
honest ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from grpo_fed.aggregation.merge.averages import merge_without_departures, weighted_mean
from grpo_fed.aggregation.merge.records import Merged, Replies
from grpo_fed.aggregation.merge.robust import squared_distances_of
from grpo_fed.policy.groups import Groups


def mix_replies(replies: Replies, shared: Tensor, mix: int) -> Replies:
    """Replace each reply's point by the weighted mean of those of its K - mix nearest clients, itself included.

    Of clients at the same distance the first by name counts. Replies without weight stay, and are nobody's neighbours.
    """
    weighted = replies.weighted
    kept = max(1, len(weighted) - mix)
    points = {}
    if weighted:
        nearest = squared_distances_of(weighted, shared).sort(dim=1, stable=True).indices[:, :kept]
        for reply, neighbours in zip(weighted, nearest.tolist(), strict=True):
            points[reply.client] = weighted_mean([weighted[number] for number in sorted(neighbours)], shared)
    return Replies(tuple(replace(reply, point=points.get(reply.client, reply.point)) for reply in replies.all))


def with_mixing(rule: Callable[..., Merged], mix: int) -> Callable[..., Merged]:
    """Return the rule with mixing before it; the rule itself without any."""
    return partial(_merge_mixed, rule, mix) if mix else rule


def _merge_mixed(rule: Callable[..., Merged], mix: int, replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """Merge mixed replies, and compare what the clients really sent with the result."""
    merged = rule(mix_replies(replies, shared, mix), shared, groups)
    return replace(merged, deviations=merge_without_departures(replies, merged.point, groups).deviations)
