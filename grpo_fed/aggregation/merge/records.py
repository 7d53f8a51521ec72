"""The records that a merge rule reads and returns.

K clients, P parameters of the shared blocks, G groups, B blocks that have groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reply:
    """The reply of one client."""

    client: str
    """The client's name."""
    point: Tensor
    """[P] float32: the shared blocks after the client's training."""
    weight: float
    """The client's weight, relative to other clients'; with 0 its deviations are measured but it changes nothing."""
    fisher: Tensor | None = None
    """[P] float32: the diagonal of the Fisher matrix of the client's policy, for the rule `fisher`."""
    start: Tensor | None = None
    """[P] float32: what the client began with, for rules that compare updates; None for the shared vector."""

    def update(self, shared: Tensor) -> Tensor:
        """Return how far the client's training moved it, [P]."""
        return self.point - (shared if self.start is None else self.start)

    def __post_init__(self) -> None:
        assert math.isfinite(self.weight), f"{self.client}: weight {self.weight}"
        assert self.weight >= 0, f"{self.client}: weight {self.weight}"


@dataclass(frozen=True, eq=False)
class Replies:
    """The replies of a round, in the order of the clients' names.

    Rules sum in this order, so that the order in which replies arrive changes no bit of the result.
    """

    all: tuple[Reply, ...]
    """[K]: the replies, also those without weight."""

    @staticmethod
    def of(replies: Iterable[Reply]) -> Replies:
        """Sort replies by the clients' names."""
        ordered = tuple(sorted(replies, key=lambda reply: reply.client))
        names = [reply.client for reply in ordered]
        assert len(set(names)) == len(names), "a client replies once"
        return Replies(ordered)

    @property
    def clients(self) -> tuple[str, ...]:
        """[K]: the clients' names."""
        return tuple(reply.client for reply in self.all)

    @property
    def weighted(self) -> tuple[Reply, ...]:
        """The replies with a weight above 0."""
        return tuple(reply for reply in self.all if reply.weight > 0)


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters of clients in each block, and the clusters' means."""

    blocks: tuple[str, ...]
    """[B]: the blocks' names."""
    members: Tensor
    """[K, B] int64: the cluster of each client in each block; cluster 0 has the most weight."""
    points: Tensor
    """[C, P]: row c has the mean of cluster c in every block; in blocks with fewer clusters, that of cluster 0."""
    ids: Tensor
    """[P] int64: the block of each parameter, -1 for none."""

    def point(self, client: int) -> Tensor:
        """Return the point that a client, 0 to K - 1, is merged into: its cluster's mean in every block, [P]."""
        cluster_of_column = torch.cat([self.members[client], self.members.new_zeros(1)])[self.ids]
        return self.points.gather(0, cluster_of_column.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True, eq=False)
class Merged:
    """The result of a merge."""

    clients: tuple[str, ...]
    """[K]: the clients' names, in the order of the replies."""
    point: Tensor
    """[P] float32: where the shared blocks should go."""
    departed: Tensor
    """[K, G] bool: whether a client departs from a parameter group, and keeps its own parameters there."""
    deviations: Tensor
    """[K, G] float32: the distance of a client's reply from the point that it is merged into; 0 with `persistence`,
    which decides by other measures."""
    clusters: Clusters | None = None
    """The clusters of the rule `clusters`, which merges clients into their clusters' means instead of one `point`."""
    notes: tuple[str, ...] = field(default=())
    """Messages about this merge, for people."""
    absent: Mapping[str, Tensor] = field(default_factory=dict)
    """[P] each: with the rule `clusters`, where the blocks of clients go that did not reply, but whose clusters did."""
