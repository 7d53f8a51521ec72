"""Learns clusters of clients, block by block: similar clients share a mean (1910.01991, 2004.11791; IFCA 2006.04088).

All clients begin as one cluster. The clients of a cluster that are in conflict with it (conflicts.py, by the evidence
of all rounds) leave it, those of one side of a split together, and share a mean of their own from then on. So there is
no threshold: clusters part where parting pays, whatever the scale of the updates. Clusters that have parted stay apart.

K clients, B blocks, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.averages import weighted_mean
from grpo_fed.aggregation.merge.conflicts import find_conflicts
from grpo_fed.aggregation.merge.distances import distances
from grpo_fed.aggregation.merge.evidence import (
    Panel,
    add_round,
    begin_anew,
    least_pairs,
    measure_updates,
    new_panel,
    sketch_sizes,
    systematic,
)
from grpo_fed.aggregation.merge.persistence import MIN_ROUNDS, MOST_ROUNDS, average_weight
from grpo_fed.aggregation.merge.records import Clusters, Merged, Replies, Reply
from grpo_fed.policy.groups import Groups

LABELS = "labels"
"""The name of the labels among a checkpoint's tensors."""


@dataclass(frozen=True, eq=False)
class ClusterEvidence:
    """What the server knows of its clients, and the clusters that they are in."""

    panel: Panel
    """All clients; its groups are the blocks."""
    labels: Tensor
    """[K, B] int64: the cluster of each client in each block; all begin in 0."""

    @property
    def asked(self) -> Mapping[str, tuple[int, ...]]:
        """The groups that clients are to try: none, since evidence alone decides."""
        return {}

    def arrays(self) -> dict[str, Tensor]:
        """Name all tensors, for a checkpoint."""
        return {**self.panel.arrays(), LABELS: self.labels}

    def with_arrays(self, arrays: Mapping[str, Tensor]) -> ClusterEvidence:
        """Put other values in the place of all tensors; ValueError naming one that is missing or does not fit."""
        if LABELS not in arrays or arrays[LABELS].shape != self.labels.shape:
            raise ValueError(LABELS)
        return ClusterEvidence(self.panel.with_arrays(arrays), arrays[LABELS])


def no_cluster_evidence(clients: Sequence[str], groups: Groups) -> ClusterEvidence:
    """Make the evidence before the first round."""
    names = tuple(sorted(clients))
    labels = torch.zeros(len(names), len(groups.as_blocks.names), dtype=torch.int64)
    return ClusterEvidence(new_panel(names, groups.as_blocks), labels)


def clusters(
    replies: Replies, shared: Tensor, groups: Groups, evidence: ClusterEvidence, most: int = 8
) -> tuple[Merged, ClusterEvidence]:
    """Add a round to the evidence, part clusters, and merge each cluster in each block.

    Clients of weight 0 are judged and get their cluster's mean, but change nothing.

    most: clusters of a block at most.
    """
    updates = measure_updates(replies, shared, groups.as_blocks, len(evidence.panel.clients))
    panel = add_round(evidence.panel, replies, updates, groups.as_blocks)
    evidence = _part(ClusterEvidence(panel, evidence.labels), replies, groups.as_blocks, most)
    return _merge(replies, shared, groups, evidence), evidence


def _part(evidence: ClusterEvidence, replies: Replies, blocks: Groups, most: int) -> ClusterEvidence:
    """Let the clients leave their clusters that are in conflict with them; their evidence begins anew.

    A cluster of a block is what a group is to the departures of `persistence`: clients are compared within it.
    """
    panel, labels = evidence.panel, evidence.labels
    pairs = [(block, int(label)) for block in range(len(blocks.names)) for label in labels[:, block].unique()]
    of_pairs = torch.tensor([block for block, _ in pairs])
    members = torch.stack([labels[:, block] == label for block, label in pairs], 1)
    present = torch.zeros(len(panel.clients), dtype=torch.bool)
    present[panel.rows(replies.clients)] = True
    weights = torch.full((len(panel.clients),), average_weight(replies), dtype=torch.float64)
    weights[panel.rows(replies.clients)] = torch.tensor([reply.weight for reply in replies.all], dtype=torch.float64)
    is_compared = (panel.rounds >= MIN_ROUNDS)[:, None] & members
    needed = (MIN_ROUNDS * 2.0**panel.decisions).clamp(max=MOST_ROUNDS)
    least = least_pairs(sketch_sizes(blocks, len(panel.clients)))[of_pairs]
    has_evidence = (panel.rounds * (panel.rounds - 1))[:, None] >= least
    has_room = torch.tensor([int(labels[:, block].unique().numel()) < most for block, _ in pairs])
    may_leave = (present & (panel.rounds >= needed))[:, None] & has_room
    between, within = systematic(panel, blocks)
    conflicts = find_conflicts(
        between[of_pairs],
        within[of_pairs],
        weights,
        is_compared,
        has_evidence,
        may_leave,
        _groups_of_pairs(blocks, pairs),
    )
    if not conflicts.leaving.any():
        return evidence
    labels = labels.clone()
    for number, (block, _) in enumerate(pairs):
        for side in conflicts.sides[:, number][conflicts.leaving[:, number]].unique().tolist():
            if labels[:, block].unique().numel() < most:
                moved = conflicts.leaving[:, number] & (conflicts.sides[:, number] == side)
                labels[moved, block] = labels[:, block].max() + 1
    moved_rows = (labels != evidence.labels).any(1).nonzero().squeeze(1)
    decisions = panel.decisions.clone()
    decisions[moved_rows] += 1
    return ClusterEvidence(replace(begin_anew(panel, moved_rows), decisions=decisions), labels)


def _groups_of_pairs(blocks: Groups, pairs: Sequence[tuple[int, int]]) -> Groups:
    """Make a group of each pair of block and cluster, for the search for conflicts, which reads names alone."""
    names = tuple(f"{blocks.names[block]} {label}" for block, label in pairs)
    chains = tuple(blocks.chains[block] for block, _ in pairs) if blocks.chains else ()
    return Groups(names, blocks.ids, blocks.sizes, tuple(blocks.names[block] for block, _ in pairs), chains)


def _merge(replies: Replies, shared: Tensor, groups: Groups, evidence: ClusterEvidence) -> Merged:
    """Average the replies of each cluster in each block."""
    whole = groups.as_blocks
    labels = evidence.labels[evidence.panel.rows(replies.clients)]
    parts = [_clusters_of_block(replies, labels[:, block]) for block in range(len(whole.names))]
    points = weighted_mean(replies.weighted, shared).repeat(max(len(of_block) for of_block in parts), 1)
    members = torch.zeros_like(labels)
    for block, of_block in enumerate(parts):
        columns = (whole.ids == block).nonzero().squeeze(1)
        for cluster, part in enumerate(of_block):
            members[[replies.clients.index(reply.client) for reply in part], block] = cluster
            if len(of_block) > 1:
                points[cluster, columns] = _mean_of_columns(part, shared, columns)
        points[len(of_block) :, columns] = points[0, columns]
    distance = torch.stack([distances([reply.point for reply in replies.all], point, groups) for point in points])
    deviations = distance.gather(0, members[:, groups.block_of_group].unsqueeze(0)).squeeze(0)
    no_departures = torch.zeros_like(deviations, dtype=torch.bool)
    found = Clusters(whole.names, members, points, whole.ids)
    absent = _absent_points(replies, evidence, found, labels)
    return Merged(replies.clients, points[0], no_departures, deviations.float(), found, absent=absent)


def _absent_points(replies: Replies, evidence: ClusterEvidence, merged: Clusters, labels: Tensor) -> dict[str, Tensor]:
    """Find where the blocks of the clients go that did not reply: with their clusters, if these have replies.

    labels: [n, B], of the replies.
    """
    points: dict[str, Tensor] = {}
    for client, own in zip(evidence.panel.clients, evidence.labels, strict=True):
        if client in replies.clients:
            continue
        rows = [(labels[:, block] == label).nonzero().flatten() for block, label in enumerate(own.tolist())]
        if all(len(of_block) for of_block in rows):
            clusters = torch.stack([merged.members[of_block[0], block] for block, of_block in enumerate(rows)])
            points[client] = replace(merged, members=clusters[None]).point(0)
    return points


def _clusters_of_block(replies: Replies, labels: Tensor) -> list[list[Reply]]:
    """Divide the replies by their labels [K], the cluster with the most weight first, then by the clients' names."""
    parts: dict[int, list[Reply]] = {}
    for reply, label in zip(replies.all, labels.tolist(), strict=True):
        parts.setdefault(label, []).append(reply)
    return sorted(parts.values(), key=lambda part: -sum(reply.weight for reply in part))


def _mean_of_columns(replies: Sequence[Reply], shared: Tensor, columns: Tensor) -> Tensor:
    """Compute the weighted mean of some columns, [n]; what they began with if none has a weight."""
    parts = [Reply(reply.client, reply.point[columns], reply.weight) for reply in replies]
    start = replies[0].start
    return weighted_mean(parts, (shared if start is None else start)[columns])
