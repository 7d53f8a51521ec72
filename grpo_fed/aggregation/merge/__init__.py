"""Merge rules: functions from the clients' replies to where the shared blocks should go.

    records.py      Reply and Replies, what a rule reads; Merged and Clusters, what it returns
    weights.py      how much each client counts in a mean
    averages.py     `mean` (FedAvg) and `fisher`, also as streams that keep no reply
    group_lasso.py  `huber`: a client may depart from a parameter group
    robust.py       `median`, `trimmed_mean`, `krum` and others: rules that tolerate hostile clients
    mixing.py       nearest-neighbour mixing of replies, before a rule
    evidence.py     what is remembered of the clients' updates over rounds, and what is systematic in them
    conflicts.py    the clients that a merge sets back, by the evidence
    learned_groups.py  which rows or columns of a block are one group, by the evidence
    persistence.py  `persistence`: clients leave groups in which they are in conflict, and come back
    clustering.py   `clusters`: clients in conflict share means of their own, block by block
    zeros.py        groups that most clients have at zero, after any rule
    distances.py    distances of replies, group by group
    custom.py       a user's own rule, checked
    rules.py        binds a scenario's rule to its settings

A rule takes the replies, the current shared vector [P] and the parameter groups of its columns, and returns `Merged`.
Its own settings are keyword arguments, which `rules.bind_rule` binds. `persistence` and `clusters` take their evidence
too, and return it with the new round. Begin with averages.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from grpo_fed.aggregation.merge.averages import StreamingFisher, StreamingMean, fisher, mean, merge_without_departures
from grpo_fed.aggregation.merge.group_lasso import huber
from grpo_fed.aggregation.merge.records import Clusters, Merged, Replies, Reply
from grpo_fed.aggregation.merge.robust import (
    centred_clipping,
    geometric_median,
    krum,
    median,
    multi_krum,
    trimmed_mean,
)
from grpo_fed.aggregation.merge.weights import ClientWork, Weighting, client_weight

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
    "centred_clipping",
    "client_weight",
    "fisher",
    "geometric_median",
    "huber",
    "krum",
    "mean",
    "median",
    "merge_without_departures",
    "multi_krum",
    "trimmed_mean",
]

RULES: Mapping[str, Callable[..., Merged]] = MappingProxyType(
    {
        "mean": mean,
        "huber": huber,
        "fisher": fisher,
        "median": median,
        "trimmed-mean": trimmed_mean,
        "krum": krum,
        "multi-krum": multi_krum,
        "geometric-median": geometric_median,
        "centred-clipping": centred_clipping,
    }
)
"""Rules without evidence, by the names that scenarios use; `module:function` in a scenario is a user's own rule."""
