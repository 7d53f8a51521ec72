"""The server's mathematics, as pure functions: from the clients' replies to the next shared blocks.

    merge/       where the shared blocks should go: merge rules, one a file
    proximity/   how far they may go: KL budgets for each block and for all together
    privacy/     differential privacy: bounds, noise, and what they cost
    secure/      secure aggregation: masks, shares, and sums without masks
    attacks.py   what hostile clients send in place of their parameters
    buffering.py what answers weigh that come late
    server_optimiser.py  how the server steps towards a merge: a rate, momentum, Adam
    outliers.py  medians with which what one client says is compared with the others

Begin with merge/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.aggregation.merge import RULES
    from grpo_fed.aggregation.merge.averages import merge_without_departures
    from grpo_fed.aggregation.merge.records import Clusters, Merged, Replies, Reply
    from grpo_fed.aggregation.proximity.interpolation import interpolate
    from grpo_fed.aggregation.proximity.measured import BudgetSearch
    from grpo_fed.aggregation.proximity.records import AcceptedBlock, AcceptedStep, Budgets

__all__ = [
    "RULES",
    "AcceptedBlock",
    "AcceptedStep",
    "BudgetSearch",
    "Budgets",
    "Clusters",
    "Merged",
    "Replies",
    "Reply",
    "interpolate",
    "merge_without_departures",
]

MODULES = {
    "AcceptedBlock": "grpo_fed.aggregation.proximity.records",
    "AcceptedStep": "grpo_fed.aggregation.proximity.records",
    "BudgetSearch": "grpo_fed.aggregation.proximity.measured",
    "Budgets": "grpo_fed.aggregation.proximity.records",
    "Clusters": "grpo_fed.aggregation.merge.records",
    "Merged": "grpo_fed.aggregation.merge.records",
    "RULES": "grpo_fed.aggregation.merge",
    "Replies": "grpo_fed.aggregation.merge.records",
    "Reply": "grpo_fed.aggregation.merge.records",
    "interpolate": "grpo_fed.aggregation.proximity.interpolation",
    "merge_without_departures": "grpo_fed.aggregation.merge.averages",
}

__getattr__ = lazy_getattr(__name__, MODULES)
