"""Zeros survive a merge: a group that most clients have at zero is merged to exactly zero.

A mean of zeros and a few small numbers is no zero, and neither is what most other rules make of them. So after a merge
by any rule, a group is set to zero if clients with more than half of the weight have all of it at exactly zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.records import Merged, Replies
from grpo_fed.policy.groups import Groups


def zero_groups(point: Tensor, groups: Groups) -> Tensor:
    """The groups of which every entry is exactly zero, [P] -> [G] bool."""
    return groups.sums((point != 0).double().unsqueeze(0)).squeeze(0) == 0


def set_to_zero(point: Tensor, zeros: Tensor, groups: Groups) -> Tensor:
    """A point [P] with some groups, [G] bool, at exactly zero."""
    return point.masked_fill(groups.per_entry(zeros.unsqueeze(0), False).squeeze(0), 0.0)


def majority_zeros(zeros: Tensor, weights: Tensor) -> Tensor:
    """The groups that clients with more than half of the weight have at zero, [G] bool.

    zeros: [K, G] bool. weights: [K, G], 0 for a group that the client has departed from.
    """
    return 2 * (weights * zeros).sum(0) > weights.sum(0)


def keep_zeros(merged: Merged, replies: Replies, penalised: Tensor, groups: Groups) -> Merged:
    """Set groups of a merge to zero, of the penalised ones [G] bool; of clusters, where most of the cluster has zeros.

    Clients that depart from a group have no vote in it.
    """
    assert merged.clients == replies.clients, "a rule keeps the order of the clients"
    zeros = torch.stack([zero_groups(reply.point, groups) for reply in replies.all])
    weights = torch.tensor([reply.weight for reply in replies.all], dtype=torch.float64).unsqueeze(1)
    weights = weights * ~merged.departed
    if merged.clusters is None:
        point = set_to_zero(merged.point, majority_zeros(zeros, weights) & penalised, groups)
        return replace(merged, point=point)
    names = list(merged.clusters.blocks)
    cluster_of_group = merged.clusters.members[:, [names.index(block) for block in groups.blocks]]
    points = [
        set_to_zero(point, majority_zeros(zeros, weights * (cluster_of_group == cluster)) & penalised, groups)
        for cluster, point in enumerate(merged.clusters.points)
    ]
    return replace(merged, point=points[0], clusters=replace(merged.clusters, points=torch.stack(points)))


class StreamingZeros:
    """Accumulates the weight of the clients that have a group at zero, one reply after another."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._weights = torch.zeros(len(groups.names), dtype=torch.float64)
        self._weight = 0.0

    def add(self, point: Tensor, weight: float) -> None:
        """Add a reply's point [P]; with weight 0 it is not read."""
        if weight:
            self._weights += weight * zero_groups(point, self._groups)
            self._weight += weight

    def result(self) -> Tensor:
        """The groups to be merged to zero, [G] bool."""
        return 2 * self._weights > self._weight
