"""What a merge reads and what it says.

K clients, P parameters of the shared blocks, G groups, B blocks that have groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reply:
    """What one client sent."""

    client: str
    """Its name."""
    point: Tensor
    """[P] float32: the shared blocks as it left them."""
    weight: float
    """In a mean, of any scale; with 0 it is judged but changes nothing."""
    fisher: Tensor | None = None
    """[P] float32: the diagonal of its policy's Fisher matrix, for `fisher`."""

    def __post_init__(self) -> None:
        assert math.isfinite(self.weight), f"{self.client}: weight {self.weight}"
        assert self.weight >= 0, f"{self.client}: weight {self.weight}"


@dataclass(frozen=True, eq=False)
class Replies:
    """What the clients of a round sent, in the order of their names: the order of arrival changes nothing.

    Sums are taken in this order in float64, so that permuting the clients changes not a bit.
    """

    all: tuple[Reply, ...]
    """[K]."""

    @staticmethod
    def of(replies: Iterable[Reply]) -> Replies:
        """In order."""
        ordered = tuple(sorted(replies, key=lambda reply: reply.client))
        names = [reply.client for reply in ordered]
        assert len(set(names)) == len(names), "a client replies once"
        return Replies(ordered)

    @property
    def clients(self) -> tuple[str, ...]:
        """[K]: their names."""
        return tuple(reply.client for reply in self.all)

    @property
    def weighted(self) -> tuple[Reply, ...]:
        """Those with a weight above 0."""
        return tuple(reply for reply in self.all if reply.weight > 0)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clients of a kind, for each block, and their means."""

    blocks: tuple[str, ...]
    """[B]: names."""
    members: Tensor
    """[K, B] int64: the cluster of each client in each block; 0 is the one of most weight."""
    points: Tensor
    """[C, P]: where a block has cluster c, row c is its mean there, and elsewhere the mean of cluster 0."""
    ids: Tensor
    """[P] int64: the block of each parameter, -1 for none."""

    def point(self, client: int) -> Tensor:
        """[P]: every block as the mean of the cluster that this client, 0 to K - 1, is in."""
        own = torch.cat([self.members[client], self.members.new_zeros(1)])[self.ids]
        return self.points.gather(0, own.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True, eq=False)
class Merged:
    """What a rule made of the replies."""

    clients: tuple[str, ...]
    """[K]: names, in order."""
    point: Tensor
    """[P] float32: where the shared blocks should go."""
    departed: Tensor
    """[K, G] bool: the client leaves the group and keeps its own parameters there; the others have no deviation."""
    deviations: Tensor
    """[K, G] float32: how far what the client sent lies from what it is merged into."""
    clusters: Clusters | None = None
    """By the rule `clusters`: what each client is merged into, instead of `point` for all."""
    notes: tuple[str, ...] = field(default=())
    """What a person should know about this merge."""
