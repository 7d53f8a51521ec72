"""Merges that a few broken or hostile clients cannot carry off.

`median` and `trimmed_mean` judge every parameter by itself (Yin et al. 2018, 1803.01498), here with weights; `krum`
judges whole clients (Blanchard et al. 2017, 1703.02757).
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
"""Sums of weights that differ by less are equal."""


def median(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """Of each parameter: as much weight below as above; half way between two if the weights fall evenly."""
    point = shared.clone()
    for columns, values, weights in _sorted(replies.weighted):
        below = weights.cumsum(0)
        half = below[-1] / 2
        low = (below < half * (1 - ROUNDING)).sum(0, keepdim=True)
        high = (below <= half * (1 + ROUNDING)).sum(0, keepdim=True)
        point[columns] = ((values.gather(0, low) + values.gather(0, high)) / 2).squeeze(0).float()
    return merge_without_departures(replies, point, groups)


def trimmed_mean(replies: Replies, shared: Tensor, groups: Groups, *, fraction: float = 0.2) -> Merged:
    """Of each parameter: the mean without this fraction of all weight at the lower end and as much at the upper.

    Weight is cut exactly: a client at the edge is kept with the rest of its weight. With a fraction of 0 it is `mean`.
    """
    assert 0 <= fraction < 0.5, f"{fraction} at both ends leaves nothing"
    if fraction == 0:
        return mean(replies, shared, groups)
    point = shared.clone()
    for columns, values, weights in _sorted(replies.weighted):
        below = weights.cumsum(0)
        first, last = fraction * below[-1], (1 - fraction) * below[-1]
        kept = (torch.minimum(below, last) - torch.maximum(below - weights, first)).clamp(min=0)
        point[columns] = ((kept * values).sum(0) / kept.sum(0)).float()
    return merge_without_departures(replies, point, groups)


def krum(replies: Replies, shared: Tensor, groups: Groups, *, byzantine: int = 1, keep: int = 1) -> Merged:
    """The mean of the `keep` clients that lie nearest to their K - byzantine - 2 nearest; multi-Krum if more than one.

    What it promises against so many byzantine clients needs K >= 2 byzantine + 3; with fewer it does what it can and
    says so.
    """
    heard = replies.weighted
    if not heard:
        return mean(replies, shared, groups)
    everything = torch.arange(shared.numel(), device=shared.device)
    squares = squared_distances([reply.point for reply in heard], shared, everything)
    neighbours = min(max(1, len(heard) - byzantine - 2), len(heard) - 1)
    scores = squares.sort(1).values[:, 1 : 1 + neighbours].sum(1)
    chosen = sorted(scores.argsort(stable=True)[:keep].tolist())
    notes = [f"krum: kept {', '.join(heard[number].client for number in chosen)}"]
    if len(heard) < 2 * byzantine + 3:
        notes.append(f"krum: {len(heard)} replies; against {byzantine} byzantine it needs {2 * byzantine + 3}")
    return merge_without_departures(
        replies, weighted_mean([heard[number] for number in chosen], shared), groups, tuple(notes)
    )


def _sorted(heard: Sequence[Reply]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some columns at a time: which, and the values there in ascending order with their weights, [H, n] float64."""
    if not heard:
        return
    weights = heard[0].point.new_tensor([reply.weight for reply in heard], dtype=torch.float64)
    width, size = max(1, ENTRIES // len(heard)), heard[0].point.numel()
    for start in range(0, size, width):
        columns = slice(start, min(start + width, size))
        values, order = torch.stack([reply.point[columns] for reply in heard]).sort(dim=0, stable=True)
        yield columns, values.double(), weights[order]
