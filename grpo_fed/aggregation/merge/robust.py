"""Robust merge rules, which tolerate a few broken or hostile clients.

`median` and `trimmed_mean` work on every parameter by itself (Yin et al. 2018, 1803.01498), here with weights; `krum`
and `multi_krum` select whole clients (Blanchard et al. 2017, 1703.02757); `geometric_median` (Pillutla et al. 2019,
1912.13445) and `centred_clipping` (Karimireddy et al. 2021, 2012.10333) bound the pull of each client as a whole.
mixing.py has the step that may come before any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.averages import StreamingMean, mean, merge_without_departures, weighted_mean
from grpo_fed.aggregation.merge.distances import squared_distances
from grpo_fed.aggregation.merge.records import Merged, Replies, Reply
from grpo_fed.aggregation.outliers import weighted_median
from grpo_fed.policy.groups import Groups

ENTRIES = 1 << 20
"""Numbers sorted at a time."""
ROUNDING = 1e-12
"""Sums of weights that differ by less than this fraction count as equal."""
ITERATIONS = 500
"""The most iterations of Weiszfeld's algorithm."""
SETTLED = 1e-9
"""Weiszfeld's algorithm ends once it moves by less than this fraction of the median distance."""
NEAR = 1e-9
"""A point counts as at least this fraction of the median distance away, so that no weight is infinite."""


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
    squares = squared_distances_of(weighted, shared)
    neighbours = min(max(1, len(weighted) - byzantine - 2), len(weighted) - 1)
    scores = squares.sort(1).values[:, 1 : 1 + neighbours].sum(1)
    chosen = [weighted[number] for number in sorted(scores.argsort(stable=True)[:keep].tolist())]
    notes = [f"krum: kept {', '.join(reply.client for reply in chosen)}"]
    if len(weighted) < 2 * byzantine + 3:
        notes.append(f"krum: {len(weighted)} replies; against {byzantine} byzantine it needs {2 * byzantine + 3}")
    return merge_without_departures(replies, weighted_mean(chosen, shared), groups, tuple(notes))


def multi_krum(replies: Replies, shared: Tensor, groups: Groups, *, byzantine: int = 1) -> Merged:
    """Merge by `krum` that keeps all clients but `byzantine`."""
    return krum(replies, shared, groups, byzantine=byzantine, keep=max(1, len(replies.weighted) - byzantine))


def geometric_median(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
    """Merge by the point z with the least weighted sum of distances, sum_k w_k ||theta_k - z||.

    Weiszfeld's algorithm (1912.13445, algorithm 2): z <- sum_k b_k theta_k / sum_k b_k with b_k = w_k /
    ||theta_k - z||, from the median of each parameter until z has settled.
    """
    weighted = replies.weighted
    if not weighted:
        return mean(replies, shared, groups)
    start = median(replies, shared, groups).point
    pulls = weiszfeld([reply.point for reply in weighted], [reply.weight for reply in weighted], start)
    if pulls is None:
        return merge_without_departures(replies, start, groups)
    stream = StreamingMean()
    for reply, pull in zip(weighted, pulls, strict=True):
        stream.add(reply.point, pull)
    point = stream.result()
    assert point is not None, "somebody pulls"
    return merge_without_departures(replies, point, groups)


def weiszfeld(points: Sequence[Tensor], weights: Sequence[float], start: Tensor) -> list[float] | None:
    """Find the weights with which the mean of points [P] is their geometric median, [K]; None if it is `start` [P].

    A rotation keeps distances, so it works on K coordinates of each point in place of P: the columns of R in the QR
    decomposition of the points less the start, each as exact as its own length.
    """
    offsets = torch.stack([point.double() - start for point in points], 1)
    coordinates = torch.linalg.qr(offsets, mode="r").R.T
    claims, centre = offsets.new_tensor(weights), torch.zeros_like(coordinates[0])
    pulls: Tensor | None = None
    for _ in range(ITERATIONS):
        away = (coordinates - centre).norm(dim=1)
        scale = float(away.median())
        if scale == 0:
            break  # half of the clients agree to the bit
        pulls = claims / away.clamp(min=NEAR * scale)
        pulls /= pulls.sum()
        moved = pulls @ coordinates
        step, centre = float((moved - centre).norm()), moved
        if step <= SETTLED * scale:
            break
    return None if pulls is None else [float(pull) for pull in pulls]


def centred_clipping(replies: Replies, shared: Tensor, groups: Groups, *, radius: float = 1.0) -> Merged:
    """Merge by the present blocks s plus the mean of the clients' updates, each cut to the same length (2012.10333).

    s + sum_k w_k d_k min(1, tau / ||d_k||) / sum_k w_k with d_k = theta_k - s and tau = radius x the weighted median of
    the ||d_k||, so that one radius fits every learning rate and every round. `radius = inf` is `mean`, bit for bit.
    """
    weighted = replies.weighted
    lengths = _distances_from([reply.point for reply in weighted], shared.double()).tolist()
    tau = radius * weighted_median(lengths, [reply.weight for reply in weighted])
    if all(length <= tau for length in lengths):
        return mean(replies, shared, groups)
    stream = StreamingMean()
    for reply, length in zip(weighted, lengths, strict=True):
        update = reply.point.double() - shared
        stream.add(update if length <= tau else update * (tau / length), reply.weight)
    step = stream.result(torch.float64)
    assert step is not None, "somebody has a weight"
    return merge_without_departures(replies, (shared + step).float(), groups)


def squared_distances_of(replies: Sequence[Reply], shared: Tensor) -> Tensor:
    """Compute the squared distances of replies from each other, [K, K] float64."""
    columns = torch.arange(shared.numel(), device=shared.device)
    return squared_distances([reply.point for reply in replies], shared, columns)


def _distances_from(points: Sequence[Tensor], centre: Tensor) -> Tensor:
    """Compute the distances of points from a centre [P] float64, [K] float64."""
    return torch.stack([(point - centre).norm() for point in points]) if points else torch.zeros(0, dtype=torch.float64)


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
