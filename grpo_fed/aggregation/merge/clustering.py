"""Learned groups of clients, block by block: those of a kind share a mean (1910.01991, 2004.11791; IFCA 2006.04088).

Clients are joined nearest first (average linkage), which gives a division for every number of clusters. The best has
the greatest mean silhouette (Rousseeuw 1987): how much nearer clients are to their own cluster than to the next, -1 to
1. If even that is small there is no structure, and the block stays one. A silhouette knows no scale, and a few clients
whose steps are tiny lie in clusters by chance; so clusters also have to lie further from each other than a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.averages import weighted_mean
from grpo_fed.aggregation.merge.distances import distances, squared_distances
from grpo_fed.aggregation.merge.group_lasso import group_thresholds
from grpo_fed.aggregation.merge.records import Clusters, Merged, Replies, Reply
from grpo_fed.policy.groups import Groups


def clusters(
    replies: Replies,
    shared: Tensor,
    groups: Groups,
    *,
    structure: float = 0.5,
    most: int = 8,
    threshold: float = 0.0,
    blocks: Mapping[str, float] = MappingProxyType({}),
) -> Merged:
    """At most so many clusters for each block, one unless the silhouette is `structure` or more and every two clusters
    lie further apart than the threshold; `limits` says what threshold and blocks mean.

    0.5 is where Kaufman & Rousseeuw (1990) begin to call a structure reasonable. Two clients alone are never divided:
    there is nothing else to tell how far far is. One without weight changes nothing and joins what is nearest.
    """
    whole, heard = groups.as_blocks, replies.weighted
    everybody = weighted_mean(heard, shared)
    least = group_thresholds(whole, threshold, blocks).tolist()
    found = [_of_block(heard, shared, groups, number, structure, most, least[number]) for number in range(len(least))]
    points = everybody.repeat(max((len(parts) for parts in found), default=1), 1)
    for number, parts in enumerate(found):
        columns = (whole.ids == number).nonzero().squeeze(1)
        means = [_mean_there(part, columns) for part in parts] if len(parts) > 1 else [everybody[columns]]
        for cluster, point in enumerate(points):
            point[columns] = means[cluster if cluster < len(means) else 0]
    away = torch.stack([distances([reply.point for reply in replies.all], point, groups) for point in points])
    members = _members(replies, found, away, groups)
    deviations = away.gather(0, members[:, groups.block_of_group].unsqueeze(0)).squeeze(0)
    nobody = torch.zeros_like(deviations, dtype=torch.bool)
    own = Clusters(whole.names, members, points, whole.ids)
    return Merged(replies.clients, points[0], nobody, deviations.float(), own)


def _of_block(
    heard: Sequence[Reply], shared: Tensor, groups: Groups, number: int, structure: float, most: int, least: float
) -> list[list[Reply]]:
    """The clusters of one block, that of most weight first, then by name."""
    if len(heard) < 3:
        return [list(heard)]
    columns = (groups.as_blocks.ids == number).nonzero().squeeze(1)
    apart = squared_distances([reply.point for reply in heard], shared, columns).sqrt()
    parts: dict[int, list[Reply]] = {}
    for reply, label in zip(heard, cluster_clients(apart, structure, most, least).tolist(), strict=True):
        parts.setdefault(label, []).append(reply)
    return sorted(parts.values(), key=lambda part: -sum(reply.weight for reply in part))


def _mean_there(part: Sequence[Reply], columns: Tensor) -> Tensor:
    """[n]: the mean of some of the columns."""
    there = [Reply(reply.client, reply.point[columns], reply.weight) for reply in part]
    return weighted_mean(there, there[0].point)


def _members(replies: Replies, found: Sequence[Sequence[Sequence[Reply]]], away: Tensor, groups: Groups) -> Tensor:
    """[K, B] int64: each client's cluster; away [C, K, G] is how far it lies from every cluster's mean."""
    squares = away.new_zeros(*away.shape[:2], len(found)).index_add_(2, groups.block_of_group, away.square())
    members = torch.zeros(squares.shape[1:], dtype=torch.int64, device=away.device)
    for block, parts in enumerate(found):
        nearest = squares[: max(1, len(parts)), :, block].argmin(0)
        cluster_of = {reply.client: cluster for cluster, part in enumerate(parts) for reply in part}
        for client, name in enumerate(replies.clients):
            members[client, block] = cluster_of.get(name, int(nearest[client]))
    return members


def cluster_clients(distances: Tensor, structure: float, most: int, least: float = 0.0) -> Tensor:
    """Clients by their distances [K, K] -> the number of the cluster of each, [K] int64, in no special order.

    `least`: every two clusters are further from each other than this, as the mean over their pairs of clients.
    """
    count = len(distances)
    labels, sizes = torch.arange(count), torch.ones(count, dtype=distances.dtype)
    linkage = distances.clone().fill_diagonal_(torch.inf)
    best, greatest = torch.zeros_like(labels), structure
    for left in range(count - 1, 1, -1):
        one, other = divmod(int(linkage.argmin()), count)
        joined = (sizes[one] * linkage[one] + sizes[other] * linkage[other]) / (sizes[one] + sizes[other])
        linkage[one], linkage[:, one] = joined, joined
        linkage[other], linkage[:, other] = torch.inf, torch.inf
        sizes[one] += sizes[other]
        labels[labels == other] = one
        if left > most or linkage.min() <= least:
            continue
        if (score := silhouette(distances, labels)) >= greatest:
            best, greatest = labels.clone(), score
    return best


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """The mean over clients [K] by their distances [K, K]; 0 for one that is alone in its cluster."""
    _, own = labels.unique(return_inverse=True)
    member = torch.nn.functional.one_hot(own).to(distances.dtype)
    sizes, sums = member.sum(0), distances @ member
    inside = sums.gather(1, own.unsqueeze(1)).squeeze(1) / (sizes[own] - 1).clamp(min=1)
    nearest = (sums / sizes).masked_fill(member.bool(), torch.inf).amin(1)
    score = (nearest - inside) / torch.maximum(nearest, inside)
    return float(torch.where((sizes[own] > 1) & (nearest + inside > 0), score, 0.0).mean())
