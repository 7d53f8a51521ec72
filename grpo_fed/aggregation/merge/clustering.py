"""Learns clusters of clients, block by block: similar clients share a mean (1910.01991, 2004.11791; IFCA 2006.04088).

Clients are joined nearest first (average linkage), which gives a partition for every number of clusters. The best has
the greatest mean silhouette (Rousseeuw 1987): how much nearer clients are to their own cluster than to the next, -1 to
1. If even that is small there is no structure, and the block has one cluster. A silhouette does not depend on scale,
and a few clients whose steps are tiny lie in clusters by chance; so clusters also have to be further from each other
than a threshold.
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
    """Merge by learned clusters of clients in each block, one for all clients where no structure is found.

    Two clients alone are one cluster: there is no third to compare their distance with. A client without weight changes
    nothing and joins the nearest cluster.

    structure: the least mean silhouette of several clusters; Kaufman & Rousseeuw (1990) call a structure reasonable
    from 0.5. most: clusters of a block at most. threshold, blocks: as for `group_thresholds`; clusters have to be
    further from each other.
    """
    whole, weighted = groups.as_blocks, replies.weighted
    mean = weighted_mean(weighted, shared)
    limits = group_thresholds(whole, threshold, blocks).tolist()
    parts = [
        _cluster_block(weighted, shared, groups, block, structure, most, limit) for block, limit in enumerate(limits)
    ]
    points = mean.repeat(max((len(block_parts) for block_parts in parts), default=1), 1)
    for block, block_parts in enumerate(parts):
        columns = (whole.ids == block).nonzero().squeeze(1)
        means = [_mean_of_columns(part, columns) for part in block_parts] if len(block_parts) > 1 else [mean[columns]]
        for cluster, point in enumerate(points):
            point[columns] = means[cluster if cluster < len(means) else 0]
    distance = torch.stack([distances([reply.point for reply in replies.all], point, groups) for point in points])
    members = _members(replies, parts, distance, groups)
    deviations = distance.gather(0, members[:, groups.block_of_group].unsqueeze(0)).squeeze(0)
    nobody = torch.zeros_like(deviations, dtype=torch.bool)
    return Merged(
        replies.clients, points[0], nobody, deviations.float(), Clusters(whole.names, members, points, whole.ids)
    )


def _cluster_block(
    replies: Sequence[Reply], shared: Tensor, groups: Groups, block: int, structure: float, most: int, least: float
) -> list[list[Reply]]:
    """Return the clusters of one block, the one with the most weight first, then by their first clients' names."""
    if len(replies) < 3:
        return [list(replies)]
    columns = (groups.as_blocks.ids == block).nonzero().squeeze(1)
    distance = squared_distances([reply.point for reply in replies], shared, columns).sqrt()
    parts: dict[int, list[Reply]] = {}
    for reply, label in zip(replies, cluster_clients(distance, structure, most, least).tolist(), strict=True):
        parts.setdefault(label, []).append(reply)
    return sorted(parts.values(), key=lambda part: -sum(reply.weight for reply in part))


def _mean_of_columns(replies: Sequence[Reply], columns: Tensor) -> Tensor:
    """Compute the weighted mean of some columns, [n]."""
    parts = [Reply(reply.client, reply.point[columns], reply.weight) for reply in replies]
    return weighted_mean(parts, parts[0].point)


def _members(replies: Replies, parts: Sequence[Sequence[Sequence[Reply]]], distance: Tensor, groups: Groups) -> Tensor:
    """Return the cluster of each client in each block, [K, B] int64; the nearest for a client without weight.

    parts: the replies of each cluster, by block. distance: [C, K, G], of each client from every cluster's mean.
    """
    squares = distance.new_zeros(*distance.shape[:2], len(parts))
    squares.index_add_(2, groups.block_of_group, distance.square())
    members = torch.zeros(squares.shape[1:], dtype=torch.int64, device=distance.device)
    for block, block_parts in enumerate(parts):
        nearest = squares[: max(1, len(block_parts)), :, block].argmin(0)
        cluster_of = {reply.client: cluster for cluster, part in enumerate(block_parts) for reply in part}
        for client, name in enumerate(replies.clients):
            members[client, block] = cluster_of.get(name, int(nearest[client]))
    return members


def cluster_clients(distances: Tensor, structure: float, most: int, least: float = 0.0) -> Tensor:
    """Cluster clients by their distances [K, K]; return a label for each, [K] int64, in no special order.

    structure: the least mean silhouette of several clusters. most: clusters at most. least: the least distance of two
    clusters, as the mean over their pairs of clients.
    """
    count = len(distances)
    labels, sizes = torch.arange(count), torch.ones(count, dtype=distances.dtype)
    linkage = distances.clone().fill_diagonal_(torch.inf)
    best, greatest = torch.zeros_like(labels), structure
    for remaining in range(count - 1, 1, -1):
        first, second = divmod(int(linkage.argmin()), count)
        joined = (sizes[first] * linkage[first] + sizes[second] * linkage[second]) / (sizes[first] + sizes[second])
        linkage[first], linkage[:, first] = joined, joined
        linkage[second], linkage[:, second] = torch.inf, torch.inf
        sizes[first] += sizes[second]
        labels[labels == second] = first
        if remaining > most or linkage.min() <= least:
            continue
        if (score := silhouette(distances, labels)) >= greatest:
            best, greatest = labels.clone(), score
    return best


def silhouette(distances: Tensor, labels: Tensor) -> float:
    """Compute the mean silhouette of clients by their distances [K, K]; a client alone in its cluster counts 0."""
    _, cluster = labels.unique(return_inverse=True)
    is_member = torch.nn.functional.one_hot(cluster).to(distances.dtype)
    sizes, sums = is_member.sum(0), distances @ is_member
    inside = sums.gather(1, cluster.unsqueeze(1)).squeeze(1) / (sizes[cluster] - 1).clamp(min=1)
    nearest = (sums / sizes).masked_fill(is_member.bool(), torch.inf).amin(1)
    score = (nearest - inside) / torch.maximum(nearest, inside)
    return float(torch.where((sizes[cluster] > 1) & (nearest + inside > 0), score, 0.0).mean())
