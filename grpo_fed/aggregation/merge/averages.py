"""Weighted means: of all alike (FedAvg, 1602.05629), and each parameter by what its Fisher says (2111.09832).

The arithmetic is defined: sums in float64, in the order in which replies are added, one division, then float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.distances import distances
from grpo_fed.aggregation.merge.records import Merged, Replies, Reply
from grpo_fed.policy.groups import Groups


class StreamingMean:
    """sum w theta / sum w, one reply after another, in the memory of one model."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.weight = 0.0

    def add(self, point: Tensor, weight: float) -> None:
        """A reply's [P]; with weight 0 it is not looked at."""
        if weight == 0:
            return
        if self._sum is None:
            self._sum = point.to(torch.float64, copy=True).mul_(weight)
        else:
            self._sum.add_(point, alpha=weight)
        self.weight += weight

    def without(self, some: Iterable[Reply]) -> StreamingMean:
        """As if these had not been added, but for rounding: of little use where one of them outweighs all others."""
        assert self._sum is not None, "nothing was added"
        left = StreamingMean()
        left._sum, left.weight = self._sum.clone(), self.weight
        for reply in some:
            left.add(reply.point, -reply.weight)
        return left

    def result(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """[P]; None as long as there is nothing to take the mean of."""
        return None if self._sum is None else (self._sum / self.weight).to(dtype)


class StreamingFisher:
    """sum w F theta / sum w F for diagonal F, the plain mean where no F says anything; in the memory of one model."""

    def __init__(self) -> None:
        self._mean = StreamingMean()
        self._sum: Tensor | None = None
        self._fisher: Tensor | None = None

    def add(self, point: Tensor, weight: float, fisher: Tensor) -> None:
        """A reply's [P] and its Fisher diagonal [P], 0 or more; with weight 0 it is not looked at."""
        if weight == 0:
            return
        self._mean.add(point, weight)
        weighted = fisher.to(torch.float64, copy=True).mul_(weight)
        if self._sum is None or self._fisher is None:
            self._sum, self._fisher = weighted * point, weighted
        else:
            self._sum.addcmul_(weighted, point)
            self._fisher.add_(weighted)

    def result(self) -> Tensor | None:
        """[P] float32; None as long as there is nothing to take the mean of."""
        mean = self._mean.result(torch.float64)
        if mean is None or self._sum is None or self._fisher is None:
            return None
        return torch.where(self._fisher > 0, self._sum / self._fisher, mean).float()


def mean(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """The weighted mean; the shared vector [P] as it is if nobody has a weight."""
    return merge_without_departures(replies, weighted_mean(replies.all, shared), groups)


def fisher(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """F^-1 sum w F theta with F = sum w F, parameter by parameter."""
    stream = StreamingFisher()
    for reply in replies.all:
        assert reply.fisher is not None, f"{reply.client} sent no Fisher diagonal"
        stream.add(reply.point, reply.weight, reply.fisher)
    point = stream.result()
    return merge_without_departures(replies, shared.clone() if point is None else point, groups)


def weighted_mean(replies: Iterable[Reply], shared: Tensor) -> Tensor:
    """[P] float32: their weighted mean, or the shared vector if there is none."""
    point = accumulate_mean(replies).result()
    return shared.clone() if point is None else point


def accumulate_mean(replies: Iterable[Reply]) -> StreamingMean:
    """With these added, in their order."""
    stream = StreamingMean()
    for reply in replies:
        stream.add(reply.point, reply.weight)
    return stream


def merge_without_departures(replies: Replies, point: Tensor, groups: Groups, notes: tuple[str, ...] = ()) -> Merged:
    """The record of a merge that nobody departs from."""
    away = distances([reply.point for reply in replies.all], point, groups)
    return Merged(replies.clients, point, torch.zeros_like(away, dtype=torch.bool), away.float(), notes=notes)
