"""Robust merge rules, which tolerate a few broken or hostile clients.

`median` and `trimmed_mean` work on every parameter by itself (Yin et al. 2018, 1803.01498), here with weights; `krum`
selects whole clients (Blanchard et al. 2017, 1703.02757).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.averages import mean, merge_without_departures, weighted_mean
from grpo_fed.aggregation.merge.distances import squared_distances
from grpo_fed.aggregation.merge.records import Merged, Replies, Reply
from grpo_fed.policy.groups import Groups

ENTRIES = 1 << 20
"""Numbers sorted at a time."""
ROUNDING = 1e-12
"""Sums of weights that differ by less than this fraction count as equal."""


def median(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """Merge by the weighted median of each parameter, half way between two values if both are medians."""
    point = shared.clone()
    for columns, values, weights in _sort_columns(replies.weighted):
        below = weights.cumsum(0)
        half = below[-1] / 2
        low = (below < half * (1 - ROUNDING)).sum(0, keepdim=True)
        high = (below <= half * (1 + ROUNDING)).sum(0, keepdim=True)
        point[columns] = ((values.gather(0, low) + values.gather(0, high)) / 2).squeeze(0).float()
    return merge_without_departures(replies, point, groups)


def trimmed_mean(replies: Replies, shared: Tensor, groups: Groups, *, fraction: float = 0.2) -> Merged:
    """Merge by the mean of each parameter without a fraction of all weight at either end.

    Weight is cut exactly: a client at the edge counts with the rest of its weight. With a fraction of 0 this is `mean`.
    """
    assert 0 <= fraction < 0.5, f"{fraction} at both ends leaves nothing"
    if fraction == 0:
        return mean(replies, shared, groups)
    point = shared.clone()
    for columns, values, weights in _sort_columns(replies.weighted):
        below = weights.cumsum(0)
        first, last = fraction * below[-1], (1 - fraction) * below[-1]
        inside = (torch.minimum(below, last) - torch.maximum(below - weights, first)).clamp(min=0)
        point[columns] = ((inside * values).sum(0) / inside.sum(0)).float()
    return merge_without_departures(replies, point, groups)


def krum(replies: Replies, shared: Tensor, groups: Groups, *, byzantine: int = 1, keep: int = 1) -> Merged:
    """Merge by the mean of the `keep` clients that are nearest to their neighbours (with more than one, multi-Krum).

    A client's score is the sum of its squared distances from its K - byzantine - 2 nearest clients. The guarantee
    against so many byzantine clients needs K >= 2 byzantine + 3; with fewer clients a note says that it does not hold.
    """
    weighted = replies.weighted
    if not weighted:
        return mean(replies, shared, groups)
    columns = torch.arange(shared.numel(), device=shared.device)
    squares = squared_distances([reply.point for reply in weighted], shared, columns)
    neighbours = min(max(1, len(weighted) - byzantine - 2), len(weighted) - 1)
    scores = squares.sort(1).values[:, 1 : 1 + neighbours].sum(1)
    chosen = [weighted[number] for number in sorted(scores.argsort(stable=True)[:keep].tolist())]
    notes = [f"krum: kept {', '.join(reply.client for reply in chosen)}"]
    if len(weighted) < 2 * byzantine + 3:
        notes.append(f"krum: {len(weighted)} replies; against {byzantine} byzantine it needs {2 * byzantine + 3}")
    return merge_without_departures(replies, weighted_mean(chosen, shared), groups, tuple(notes))


def _sort_columns(replies: Sequence[Reply]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a part of the columns, and their values in ascending order with their weights, [H, n] float64 each."""
    if not replies:
        return
    weights = replies[0].point.new_tensor([reply.weight for reply in replies], dtype=torch.float64)
    width, size = max(1, ENTRIES // len(replies)), replies[0].point.numel()
    for start in range(0, size, width):
        columns = slice(start, min(start + width, size))
        values, order = torch.stack([reply.point[columns] for reply in replies]).sort(dim=0, stable=True)
        yield columns, values.double(), weights[order]
