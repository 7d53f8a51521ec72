"""The server's merges: what the clients sent -> where the shared blocks should go, by rules with one signature.

A rule reads the replies, the current shared vector [P] and the groups of its columns, and says `Merged`. Its own knobs
are keywords, to be bound with `functools.partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from grpo_fed.aggregation.merge.averages import StreamingFisher, StreamingMean, fisher, mean, merge_without_departures
from grpo_fed.aggregation.merge.clustering import clusters
from grpo_fed.aggregation.merge.group_lasso import huber
from grpo_fed.aggregation.merge.records import Clusters, Merged, Replies, Reply
from grpo_fed.aggregation.merge.robust import krum, median, trimmed_mean
from grpo_fed.aggregation.merge.weights import ClientWork, Weighting, weight

__all__ = [
    "RULES",
    "ClientWork",
    "Clusters",
    "Merged",
    "Replies",
    "Reply",
    "StreamingFisher",
    "StreamingMean",
    "Weighting",
    "clusters",
    "fisher",
    "huber",
    "krum",
    "mean",
    "median",
    "merge_without_departures",
    "trimmed_mean",
    "weight",
]

RULES: Mapping[str, Callable[..., Merged]] = MappingProxyType(
    {
        "mean": mean,
        "huber": huber,
        "fisher": fisher,
        "median": median,
        "trimmed-mean": trimmed_mean,
        "krum": krum,
        "clusters": clusters,
    }
)
"""By the names that scenarios use; `module:function` in a scenario is a rule of the user's own."""
