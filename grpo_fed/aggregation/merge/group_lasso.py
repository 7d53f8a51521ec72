"""The group lasso between clients: replies near each other are averaged, one that lies apart keeps its own.

    min over s, delta of  sum_k w_k [ 1/2 ||theta_k - s - delta_k||^2 + tau_g ||delta_k||_2 ],  for each group g

For a given s the best delta_k is 0 within tau_g of s, and beyond it all but the last tau_g of theta_k - s (Yuan & Lin
2006). What is left is a robust location, min over s of sum_k w_k rho(||theta_k - s||) with Huber's rho (1964), solved
by means with weights w_k min(1, tau_g / ||theta_k - s||) until they rest. So no client pulls with more than
w_k * tau_g. A client that departs keeps its whole deviation, not what the lasso would leave of it.

The lasso is there to say who departs. What it leaves of s is shrunk too: those who depart pull at it in every round,
always the same way. So with `refit` the problem is solved anew without the penalty, and with the departures that were
found: s is the mean of those who stay. Where nobody stays it remains the lasso's.

Every such mean is sum_k c_k theta_k, and its distance from each reply follows from the products of the replies with
each other. So the iteration runs on the coefficients c, and parameters are read a few times, not at each step; and
those that stay near need no products: together they pull like one client at their mean.
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
"""A step is the last one if it is this small a part of how far the points lie, each counted as it pulls."""
ABSURD = 1e6
"""Thresholds. Of a sum with a client that far away, too few digits are left to take it out again."""
ENTRIES = 1 << 17
"""Numbers iterated on at a time; they stay in a core's cache."""


def huber(
    replies: Replies,
    shared: Tensor,
    groups: Groups,
    *,
    threshold: float = 0.02,
    blocks: Mapping[str, float] = MappingProxyType({}),
    refit: bool = True,
) -> Merged:
    """Merge with the right to leave; `limits` says what threshold and blocks mean.

    With a threshold of infinity it is `mean` bit for bit. With 0 everybody departs and the shared vector [P] stays.
    """
    tau = group_thresholds(groups, threshold, blocks)
    points, heard = [reply.point for reply in replies.all], replies.weighted
    loud = torch.tensor([reply.weight > 0 for reply in replies.all], dtype=torch.bool, device=shared.device)
    everybody = accumulate_mean(heard)
    mean = everybody.result()
    point = _where(groups, tau == 0, shared, shared if mean is None else mean)
    away = distances(points, point, groups)
    apart = torch.zeros(len(heard), dtype=torch.bool, device=shared.device)
    moved = torch.zeros_like(tau, dtype=torch.bool)
    while True:
        # Whoever may depart has to be among those apart; they only get more, so this ends.
        out = (away[loud] > tau) & (tau > 0) & ~apart.unsqueeze(1)
        if not out.any():
            break
        apart = apart | (out.any(1) if apart.any() else _first_to_remove(away[loud], out))
        moved |= out.any(0)
        alone = list(compress(heard, apart.tolist()))
        crowd = everybody.without(alone)
        if crowd.weight < everybody.weight / 2 or bool((away[loud] > ABSURD * tau)[:, tau > 0].any()):
            crowd = accumulate_mean(compress(heard, (~apart).tolist()))
        point = _solve_location(alone, crowd, shared, point, groups, torch.where(moved, tau, torch.inf))
        away = distances(points, point, groups)
    departed = (away > tau) | (tau == 0)
    if refit and departed.any():
        point = _mean_of_remaining(heard, departed[loud], point, groups)
        away = distances(points, point, groups)
    return Merged(replies.clients, point, departed, away.float())


def _mean_of_remaining(heard: Sequence[Reply], departed: Tensor, point: Tensor, groups: Groups) -> Tensor:
    """The point [P] with the mean of those who stay, wherever some depart [H, G] and others do not."""
    torn = (departed.any(0) & ~departed.all(0)).nonzero().squeeze(1)
    if not torn.numel():
        return point
    refitted = point.clone()
    patterns, kinds = departed[:, torn].T.unique(dim=0, return_inverse=True)
    kind_of = torch.full((len(groups.names) + 1,), -1, dtype=torch.int64, device=point.device)
    kind_of[torn] = kinds
    for number, gone in enumerate(patterns.tolist()):  # groups that the same clients leave, at once
        columns = (kind_of[groups.ids_or_last] == number).nonzero().squeeze(1)
        staying = (Reply(reply.client, reply.point[columns], reply.weight) for reply in compress(heard, _others(gone)))
        refitted[columns] = weighted_mean(staying, point[columns])
    return refitted


def _others(chosen: Sequence[bool]) -> list[bool]:
    return [not one for one in chosen]


def group_thresholds(groups: Groups, threshold: float, blocks: Mapping[str, float]) -> Tensor:
    """Return tau_g = sqrt(n_g) times the threshold of the group's block, [G] float64.

    threshold: a root mean square deviation of a parameter. blocks: thresholds of their own, by pattern of blocks.

    Raises a ValueError where a pattern matches no block, or two match the same one.
    """
    names = groups.as_blocks.names
    by_block = dict.fromkeys(names, threshold) | values_by_name(blocks, names, "merge.blocks", "block")
    assert all(value >= 0 for value in by_block.values()), f"a threshold below 0: {by_block}"
    return groups.sqrt_sizes.new_tensor([by_block[block] for block in groups.blocks]) * groups.sqrt_sizes


def _first_to_remove(away: Tensor, out: Tensor) -> Tensor:
    """Whom to take out of the mean first, [H] bool: a few who lie far drag it away from all others.

    Those would seem to depart as well; they are in the majority, and about as far from the mean as each other.
    """
    far = out & (away > 1.25 * away.median(0).values)
    return torch.where(far.any(0), far, out).any(1)


def _solve_location(
    alone: Sequence[Reply], crowd: StreamingMean, shared: Tensor, point: Tensor, groups: Groups, tau: Tensor
) -> Tensor:
    """The best point [P] if all of the crowd lie within tau [G] of it; unchanged where tau is inf."""
    points, weights = [reply.point for reply in alone], [reply.weight for reply in alone]
    middle = crowd.result(torch.float64)
    if middle is not None:
        points, weights = [*points, middle], [*weights, crowd.weight]
    w, new = tau.new_tensor(weights), point.clone()
    for alike, columns in columns_of_groups(groups, tau.isfinite().nonzero().squeeze(1).tolist()):
        many = max(1, ENTRIES // (len(points) * min(len(points), columns.shape[1])))
        for some, lies in zip(alike.split(many), columns.split(many), strict=True):
            c = _coefficients(points, shared, lies, w, tau[some].unsqueeze(1))
            for part, offset in offsets(points, shared, lies):
                new[part] = (shared[part].double() + (c.unsqueeze(1) @ offset).squeeze(1)).float()
    return new


def _coefficients(points: Sequence[Tensor], origin: Tensor, columns: Tensor, weights: Tensor, tau: Tensor) -> Tensor:
    """[g, N]: of the best point of each of g groups, by the products of N points or, where that is less, by themselves.

    columns: [g, n]. weights: [N]. tau: [g, 1].
    """
    if columns.shape[1] > len(points):
        product = products(points, origin, columns)
        squares = product.diagonal(dim1=1, dim2=2)
        return _fixed_point(lambda c: (product @ c.unsqueeze(2)).squeeze(2), squares, weights, tau)
    offset = torch.cat([part for _, part in offsets(points, origin, columns)], 2)
    across = offset.mT.contiguous()
    squares = offset.square().sum(2)
    return _fixed_point(lambda c: (offset @ (across @ c.unsqueeze(2))).squeeze(2), squares, weights, tau)


def _fixed_point(product: Callable[[Tensor], Tensor], squares: Tensor, weights: Tensor, tau: Tensor) -> Tensor:
    """Coefficients [g, N] of the N points' mean that Huber's weights no longer change.

    product: of each point with the mean sum_k c_k x_k, [g, N] -> [g, N]. squares: [g, N], of each with itself. weights:
    [N]. tau: [g, 1].

    The plain iteration only ever goes down, but slowly where the bottom is flat (two clients who disagree); so a step
    is doubled as long as that goes down further.
    """

    def away(c: Tensor, crossed: Tensor) -> Tensor:
        return (squares - 2 * crossed + (c * crossed).sum(1, keepdim=True)).clamp(min=0).sqrt()

    def cost(r: Tensor) -> Tensor:
        return (weights * torch.where(r <= tau, r.square() / 2, tau * (r - tau / 2))).sum(1, keepdim=True)

    c = (weights / weights.sum()).expand_as(squares)
    stride = torch.full_like(c[:, :1], 2.0)
    for _ in range(ITERATIONS):
        crossed = product(c)
        r = away(c, crossed)
        pull = weights * (tau / r).clamp(max=1)
        step = pull / pull.sum(1, keepdim=True) - c
        along = product(step)
        near, far = c + step, c + stride * step
        further = cost(away(far, crossed + stride * along)) < cost(away(near, crossed + along))
        c, stride = torch.where(further, far, near), torch.where(further, 2 * stride, 2.0)
        scale = (pull * r).sum(1) / pull.sum(1)
        if ((step * along).sum(1) <= (TOLERANCE * scale).square()).all():
            break
    return c


def _where(groups: Groups, chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """[P]: from yes in the chosen groups [G] bool, from no elsewhere."""
    return torch.where(torch.cat([chosen, chosen.new_zeros(1)])[groups.ids_or_last], yes, no)
