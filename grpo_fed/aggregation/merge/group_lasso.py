"""Merges by the group lasso between clients: replies near each other are averaged, and a client that is far departs.

    min over s, delta of  sum_k w_k [ 1/2 ||theta_k - s - delta_k||^2 + tau_g ||delta_k||_2 ],  for each group g

For a given s, the best delta_k is 0 within tau_g of s, and beyond it all but the last tau_g of theta_k - s (Yuan & Lin
2006). Eliminating delta leaves a robust location, min over s of sum_k w_k rho(||theta_k - s||) with Huber's rho (1964),
so no client pulls with more than w_k * tau_g. A client that departs keeps its whole deviation, not what the lasso would
leave of it. `huber` solves this in five steps:

1. Begin with s as the weighted mean of all replies.
2. Mark the clients that lie beyond tau_g of s in some group.
3. Solve for s in every group in which some client has been beyond tau_g. The unmarked clients are one point at their
   mean: as long as each lies within tau_g of s, together they pull like one client there.
4. Repeat 2 and 3 until no further client is marked. Marks are never removed, so this ends.
5. A client departs from the groups in which it lies beyond tau_g. The lasso decides this well, but leaves s shrunk: a
   departed client still pulls at it, in every round the same way. So with `refit` s becomes the mean of the clients
   that stay; in a group that all leave it remains the lasso's.

Step 3 is iteratively reweighted least squares (`_fixed_point`): means with weights w_k min(1, tau_g / ||theta_k - s||),
until they no longer change. Every such mean is sum_k c_k theta_k, and its distance from each reply follows from the
inner products of the replies. So the iteration runs on the coefficients c, and parameters are read only a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from types import MappingProxyType

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.averages import StreamingMean, accumulate_mean, weighted_mean
from grpo_fed.aggregation.merge.distances import columns_of_groups, distances, offsets, products
from grpo_fed.aggregation.merge.records import Merged, Replies, Reply
from grpo_fed.policy.groups import Groups
from grpo_fed.policy.patterns import values_by_name

ITERATIONS = 1000
TOLERANCE = 1e-8
"""The iteration ends with a step of this fraction of the points' mean distance from s, each counted as it pulls."""
ABSURD = 1e6
"""Thresholds. A client further away than this leaves too few digits in a sum to be subtracted from it again."""
ENTRIES = 1 << 17
"""Numbers that the iteration works on at a time; they fit a core's cache."""


def huber(
    replies: Replies,
    shared: Tensor,
    groups: Groups,
    *,
    threshold: float = 0.02,
    blocks: Mapping[str, float] = MappingProxyType({}),
    refit: bool = True,
) -> Merged:
    """Merge by the group lasso between clients, in the steps that the module's docstring numbers.

    With a threshold of infinity this is `mean` bit for bit. With 0 every client departs from every group, and the
    shared vector [P] stays.

    threshold, blocks: as for `group_thresholds`. refit: whether departed clients no longer pull (step 5).
    """
    tau = group_thresholds(groups, threshold, blocks)
    points, weighted = [reply.point for reply in replies.all], replies.weighted
    has_weight = torch.tensor([reply.weight > 0 for reply in replies.all], dtype=torch.bool, device=shared.device)
    total = accumulate_mean(weighted)
    mean = total.result()
    point = _select_groups(groups, tau == 0, shared, shared if mean is None else mean)
    deviations = distances(points, point, groups)
    marked = torch.zeros(len(weighted), dtype=torch.bool, device=shared.device)
    to_solve = torch.zeros_like(tau, dtype=torch.bool)
    while True:
        beyond = (deviations[has_weight] > tau) & (tau > 0) & ~marked.unsqueeze(1)
        if not beyond.any():
            break
        marked = marked | (beyond.any(1) if marked.any() else _first_to_mark(deviations[has_weight], beyond))
        to_solve |= beyond.any(0)
        marked_replies = list(compress(weighted, marked.tolist()))
        unmarked_mean = total.without(marked_replies)
        is_far = bool((deviations[has_weight] > ABSURD * tau)[:, tau > 0].any())
        if unmarked_mean.weight < total.weight / 2 or is_far:  # then rounding would matter in the difference
            unmarked_mean = accumulate_mean(compress(weighted, (~marked).tolist()))
        limits = torch.where(to_solve, tau, torch.inf)
        point = _solve_location(marked_replies, unmarked_mean, shared, point, groups, limits)
        deviations = distances(points, point, groups)
    departed = (deviations > tau) | (tau == 0)
    if refit and departed.any():
        point = _mean_of_remaining(weighted, departed[has_weight], point, groups)
        deviations = distances(points, point, groups)
    return Merged(replies.clients, point, departed, deviations.float())


def group_thresholds(groups: Groups, threshold: float, blocks: Mapping[str, float]) -> Tensor:
    """Return tau_g = sqrt(n_g) times the threshold of the group's block, [G] float64.

    threshold: a root mean square deviation of a parameter. blocks: thresholds of their own, by pattern of blocks.

    Raises a ValueError where a pattern matches no block, or two match the same one.
    """
    names = groups.as_blocks.names
    by_block = dict.fromkeys(names, threshold) | values_by_name(blocks, names, "merge.blocks", "block")
    assert all(value >= 0 for value in by_block.values()), f"a threshold below 0: {by_block}"
    return groups.sqrt_sizes.new_tensor([by_block[block] for block in groups.blocks]) * groups.sqrt_sizes


def _first_to_mark(deviations: Tensor, beyond: Tensor) -> Tensor:
    """Return the clients to mark first, [H] bool, where no client is marked yet.

    A few clients that lie far away drag the mean away from all others. The others then seem to be beyond tau as well;
    but they are the majority, and all about as far from the mean as the median client. So clients that are further
    than that come first.

    deviations: [H, G], distances from the mean. beyond: [H, G] bool.
    """
    far = beyond & (deviations > 1.25 * deviations.median(0).values)
    return torch.where(far.any(0), far, beyond).any(1)


def _solve_location(
    marked: Sequence[Reply], unmarked_mean: StreamingMean, shared: Tensor, point: Tensor, groups: Groups, tau: Tensor
) -> Tensor:
    """Solve for the location [P], with the unmarked clients as one point at their mean.

    shared: [P], an origin near the points. point: [P], what the result is in groups whose tau [G] is infinite.
    """
    points, weights = [reply.point for reply in marked], [reply.weight for reply in marked]
    middle = unmarked_mean.result(torch.float64)
    if middle is not None:
        points, weights = [*points, middle], [*weights, unmarked_mean.weight]
    w, location = tau.new_tensor(weights), point.clone()
    for equal_sized, columns in columns_of_groups(groups, tau.isfinite().nonzero().squeeze(1).tolist()):
        chunk = max(1, ENTRIES // (len(points) * min(len(points), columns.shape[1])))
        for chunk_groups, chunk_columns in zip(equal_sized.split(chunk), columns.split(chunk), strict=True):
            c = _solve_coefficients(points, shared, chunk_columns, w, tau[chunk_groups].unsqueeze(1))
            for part, offset in offsets(points, shared, chunk_columns):
                location[part] = (shared[part].double() + (c.unsqueeze(1) @ offset).squeeze(1)).float()
    return location


def _solve_coefficients(
    points: Sequence[Tensor], origin: Tensor, columns: Tensor, weights: Tensor, tau: Tensor
) -> Tensor:
    """Solve for the coefficients of the location as a mean of N points in each of g groups, [g, N].

    Works on the inner products of the points, or on the points where a group has no more columns than there are points.

    columns: [g, n]. weights: [N]. tau: [g, 1].
    """
    if columns.shape[1] > len(points):
        product = products(points, origin, columns)
        squares = product.diagonal(dim1=1, dim2=2)
        return _fixed_point(lambda c: (product @ c.unsqueeze(2)).squeeze(2), squares, weights, tau)
    offset = torch.cat([part for _, part in offsets(points, origin, columns)], 2)
    transposed = offset.mT.contiguous()
    squares = offset.square().sum(2)
    return _fixed_point(lambda c: (offset @ (transposed @ c.unsqueeze(2))).squeeze(2), squares, weights, tau)


def _fixed_point(product: Callable[[Tensor], Tensor], squares: Tensor, weights: Tensor, tau: Tensor) -> Tensor:
    """Iteratively reweighted least squares with step doubling: the fixed point of the coefficients c, [g, N].

    Each step moves c to the coefficients of the mean with weights w_k min(1, tau / r_k), r_k the distance of point x_k
    from sum_k c_k x_k. Such steps never raise Huber's cost, but are slow where it is nearly flat, as between two
    clients that disagree. So a step is stretched, twice as far each time, as long as that lowers the cost further.

    product: maps c to the inner products of each point with sum_k c_k x_k, [g, N] -> [g, N]. squares: ||x_k||^2,
    [g, N]. weights: [N]. tau: [g, 1].
    """

    def distance(c: Tensor, with_mean: Tensor) -> Tensor:
        """||x_k - m||^2 = ||x_k||^2 - 2 x_k'm + m'm; with_mean: x_k'm, [g, N]."""
        return (squares - 2 * with_mean + (c * with_mean).sum(1, keepdim=True)).clamp(min=0).sqrt()

    def cost(r: Tensor) -> Tensor:
        return (weights * torch.where(r <= tau, r.square() / 2, tau * (r - tau / 2))).sum(1, keepdim=True)

    c = (weights / weights.sum()).expand_as(squares)
    stretch = torch.full_like(c[:, :1], 2.0)
    for _ in range(ITERATIONS):
        with_mean = product(c)
        r = distance(c, with_mean)
        pull = weights * (tau / r).clamp(max=1)
        step = pull / pull.sum(1, keepdim=True) - c
        with_step = product(step)
        plain, stretched = c + step, c + stretch * step
        is_lower = cost(distance(stretched, with_mean + stretch * with_step)) < cost(
            distance(plain, with_mean + with_step)
        )
        c, stretch = torch.where(is_lower, stretched, plain), torch.where(is_lower, 2 * stretch, 2.0)
        scale = (pull * r).sum(1) / pull.sum(1)
        if ((step * with_step).sum(1) <= (TOLERANCE * scale).square()).all():
            break
    return c


def _mean_of_remaining(weighted: Sequence[Reply], departed: Tensor, point: Tensor, groups: Groups) -> Tensor:
    """Return the point [P] with the mean of the clients that stay, in groups that some leave and others do not.

    departed: [H, G] bool.
    """
    split = (departed.any(0) & ~departed.all(0)).nonzero().squeeze(1)
    if not split.numel():
        return point
    refitted = point.clone()
    patterns, pattern_numbers = departed[:, split].T.unique(dim=0, return_inverse=True)
    pattern_of_group = torch.full((len(groups.names) + 1,), -1, dtype=torch.int64, device=point.device)
    pattern_of_group[split] = pattern_numbers
    for number, has_departed in enumerate(patterns.tolist()):  # at once, all groups that the same clients leave
        columns = (pattern_of_group[groups.ids_or_last] == number).nonzero().squeeze(1)
        remaining = compress(weighted, [not gone for gone in has_departed])
        parts = (Reply(reply.client, reply.point[columns], reply.weight) for reply in remaining)
        refitted[columns] = weighted_mean(parts, point[columns])
    return refitted


def _select_groups(groups: Groups, chosen: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """Take `inside` [P] in the chosen groups [G] bool, and `outside` [P] elsewhere."""
    return torch.where(torch.cat([chosen, chosen.new_zeros(1)])[groups.ids_or_last], inside, outside)
