"""Weighted means: by clients' weights (FedAvg, 1602.05629), and also by their Fisher diagonals (2111.09832).

The order of operations is fixed, so that results are equal to the bit: sums in float64, in the order in which replies
are added, one division, then float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.distances import distances
from grpo_fed.aggregation.merge.records import Merged, Replies, Reply
from grpo_fed.policy.groups import Groups


class StreamingMean:
    """Accumulates sum w theta / sum w, one reply after another, in the memory of one model."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.weight = 0.0

    def add(self, point: Tensor, weight: float) -> None:
        """Add a reply's point [P]; with weight 0 it is not read."""
        if weight == 0:
            return
        if self._sum is None:
            self._sum = point.to(torch.float64, copy=True).mul_(weight)
        else:
            self._sum.add_(point, alpha=weight)
        self.weight += weight

    def without(self, replies: Iterable[Reply]) -> StreamingMean:
        """Return the mean without some of its replies, by subtraction.

        It is inexact where they outweigh the others by far, as rounding errors of the sum remain.
        """
        assert self._sum is not None, "nothing was added"
        rest = StreamingMean()
        rest._sum, rest.weight = self._sum.clone(), self.weight
        for reply in replies:
            rest.add(reply.point, -reply.weight)
        return rest

    def result(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Return the mean [P]; None if no reply with a weight was added."""
        return None if self._sum is None else (self._sum / self.weight).to(dtype)


CLIP = 100.0
"""How many times the mean of its diagonal an entry of a client's Fisher matrix may count."""


def normalise_fisher(fisher: Tensor) -> Tensor:
    """Divide a Fisher diagonal [P] by its mean and clip it, so that no client has more say than another; float64."""
    fisher = fisher.to(torch.float64)
    mean = float(fisher.mean()) if fisher.numel() else 0.0
    return (fisher / mean).clamp_(max=CLIP) if mean > 0 else fisher.clone()


class StreamingFisher:
    """Accumulates sum w F theta / sum w F for normalised diagonals F, in the memory of three models; a plain mean where
    F is 0.
    """

    def __init__(self) -> None:
        self._mean = StreamingMean()
        self._sum: Tensor | None = None
        self._fisher: Tensor | None = None

    def add(self, point: Tensor, weight: float, fisher: Tensor) -> None:
        """Add a reply's point [P] and its Fisher diagonal [P], 0 or more; with weight 0 they are not read."""
        if weight == 0:
            return
        self._mean.add(point, weight)
        weighted = normalise_fisher(fisher).mul_(weight)
        if self._sum is None or self._fisher is None:
            self._sum, self._fisher = weighted * point, weighted
        else:
            self._sum.addcmul_(weighted, point)
            self._fisher.add_(weighted)

    def result(self) -> Tensor | None:
        """Return the mean [P] float32; None if no reply with a weight was added."""
        mean = self._mean.result(torch.float64)
        if mean is None or self._sum is None or self._fisher is None:
            return None
        return torch.where(self._fisher > 0, self._sum / self._fisher, mean).float()


def mean(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """Merge by the weighted mean; the shared vector [P] stays if no client has a weight."""
    return merge_without_departures(replies, weighted_mean(replies.all, shared), groups)


def fisher(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """Merge by F^-1 sum_k w_k F_k theta_k with F = sum_k w_k F_k, parameter by parameter, of normalised F_k."""
    stream = StreamingFisher()
    for reply in replies.all:
        assert reply.fisher is not None, f"{reply.client} sent no Fisher diagonal"
        stream.add(reply.point, reply.weight, reply.fisher)
    point = stream.result()
    return merge_without_departures(replies, shared.clone() if point is None else point, groups)


def weighted_mean(replies: Iterable[Reply], shared: Tensor) -> Tensor:
    """Compute the weighted mean of replies, [P] float32; the shared vector if no reply has a weight."""
    point = accumulate_mean(replies).result()
    return shared.clone() if point is None else point


def accumulate_mean(replies: Iterable[Reply]) -> StreamingMean:
    """Add replies to a new mean, in their order."""
    stream = StreamingMean()
    for reply in replies:
        stream.add(reply.point, reply.weight)
    return stream


def merge_without_departures(replies: Replies, point: Tensor, groups: Groups, notes: tuple[str, ...] = ()) -> Merged:
    """Return the record of a merge into one point [P] for all clients, from which no client departs."""
    deviations = distances([reply.point for reply in replies.all], point, groups)
    no_departures = torch.zeros_like(deviations, dtype=torch.bool)
    return Merged(replies.clients, point, no_departures, deviations.float(), notes=notes)
