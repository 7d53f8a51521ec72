"""Proximal steps of the group penalties in the metric of Adam's preconditioner (2007.07914), for K clients at once.

With a step length h_i of its own for each parameter the step solves, over z [P],

    min sum_i (z_i - x_i)^2 / (2 h_i) + sum_g t_g ||z_g||_2  (+ l1 ||z||_1)  (+ sum_b o_b ||z_b||_2)

with t_g = weight sqrt(n_g) and o_b = outer sqrt(n_b). Any x with x = step(x - h grad f(x)) then solves
-grad f(x) in the penalty's subdifferential at x, whatever h > 0 is: it is a minimum of f + penalty.

Groups. z = 0 exactly if ||x / h||_2 <= t. Else z_i = x_i r / (r + t h_i), where r = ||z||_2 is the root of
psi(r, t) = 1 with psi(a, b) = (sum_i x_i^2 / (a + b h_i)^2)^(-1/2). As a power mean of linear functions psi is concave
in (a, b), so Newton's method from below the root never passes it. An l1 term first moves every x_i towards 0 by l1 h_i.

Nested groups. In this metric the step of the blocks after that of the groups does not solve the sum of the two. With
q = ||z_b||_2 / o_b and u_g = q / ||z_g||_2 the solution is z_i = x_i q / (q + (1 + t u) h_i), where psi(q, 1 + t u) = u
for every group and sum_g u_g^-2 = o^2. u as a function of q is concave, being the border of the convex set
psi(q, 1 + t u) >= u, and so is (sum_g u_g^-2)^(-1/2). A Newton step for q and all u together therefore never passes the
root either, and costs as much as one for the groups alone. Groups are 0 as without blocks; a block is 0 exactly if
sum_g max(0, ||x_g / h_g||_2 - t_g)^2 <= o^2.

All of it is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo_fed.policy.groups import Groups

SMALLEST = 1e-40
"""A shorter step counts as one of this length, and a smaller weight as 0: their products must not vanish."""
TOLERANCE = 1e-5
"""A root is found with the Newton step that is shorter than this part of it: the error is about this, squared."""
MOST_ITERATIONS = 60


def preconditioned_group(x: Tensor, steps: Tensor, groups: Groups, weight: Tensor) -> Tensor:
    """Take the step of the groups' norms, [K, P] -> [K, P]. steps: h, [K, P]. weight: [K, 1].

    Groups of similar sizes are solved together, as rows that are filled up with zeros.
    """
    padded, padded_steps = pad(x, (0, 1)), pad(steps, (0, 1), value=1.0)
    limits, after = _limits(weight, groups, len(x)), padded.clone()
    for members, columns in groups.by_size:
        shape = (len(x), *columns.shape)
        points = padded.index_select(1, columns.flatten()).double().view(shape)
        lengths = _lengths(padded_steps.index_select(1, columns.flatten())).view(shape)
        scaled = lengths.mul(limits[:, members, None])
        norms = _solve_groups(points.square(), lengths, scaled, limits[:, members]).unsqueeze(2)
        points.mul_(norms / scaled.add_(norms))
        after.index_copy_(1, columns.flatten(), points.flatten(1).to(x.dtype))
    return after[:, :-1].contiguous()


def preconditioned_sparse_group(x: Tensor, steps: Tensor, groups: Groups, weight: Tensor, l1: float) -> Tensor:
    """Move each entry of x [K, P] towards 0 by l1 h, then take the step of the groups' norms."""
    limits = (l1 * _lengths(steps)).clamp_(max=torch.finfo(torch.float64).max) * groups.in_a_group
    points = x.double()
    moved = points.abs().sub_(limits).relu_().copysign_(points)
    return preconditioned_group(moved, steps, groups, weight).to(x.dtype)


def preconditioned_nested(x: Tensor, steps: Tensor, groups: Groups, weight: Tensor, outer: float) -> Tensor:
    """Take the step of the groups' and the blocks' norms together, [K, P] -> [K, P]."""
    if outer < SMALLEST:
        return preconditioned_group(x, steps, groups, weight)
    points, lengths = x.double(), _lengths(steps)
    limits = _limits(weight, groups, len(x))
    of_blocks = outer * groups.as_blocks.sqrt_sizes
    norms, shares = _solve_blocks(points.square(), lengths, limits, of_blocks, groups)
    return _shortened(points, lengths, norms, shares, groups).to(x.dtype)


def _solve_groups(squares: Tensor, lengths: Tensor, scaled: Tensor, limits: Tensor) -> Tensor:
    """The norms r [K, G] of the groups after the step: 0 where a group vanishes, 1 where its limit is 0.

    squares, lengths, scaled: x^2, h and t h, [K, G, n]. limits: t, [K, G].
    """
    sums = squares.sum(2)
    mean_lengths = (squares * lengths).sum(2) / sums
    norms = (sums.sqrt() - limits * mean_lengths).clamp_(min=0.0)  # below the root, by Jensen's inequality
    change = _newton_step(squares, scaled, norms)
    found = (norms > 0) & (change.abs() <= TOLERANCE * norms)
    norms = torch.where(norms > 0, (norms + change).clamp_(min=0.0), norms)
    norms = torch.where(sums > 0, norms, sums)  # also NaN stays NaN
    norms = torch.where(limits > 0, norms, 1.0)
    rest = ~found & (limits > 0) & (sums > 0)
    return norms.masked_scatter(rest, _search(squares[rest], scaled[rest], norms[rest])) if rest.any() else norms


def _search(squares: Tensor, scaled: Tensor, norms: Tensor) -> Tensor:
    """Find the norms [M] of the groups that are left, from below. squares, scaled: [M, n]."""
    searching = (squares / scaled.square()).sum(1) > 1  # ||x / h|| > t
    norms = torch.where(searching, norms, 0.0)
    for _ in range(MOST_ITERATIONS):
        if not searching.any():
            break
        change = torch.where(searching, _newton_step(squares, scaled, norms), 0.0)
        norms = (norms + change).clamp_(min=0.0)
        searching = searching & (change.abs() > TOLERANCE * norms)
    return norms


def _newton_step(squares: Tensor, scaled: Tensor, norms: Tensor) -> Tensor:
    """How far Newton's method moves norms [...] towards psi(r, t) = 1; squares, scaled: x^2 and t h, [..., n]."""
    inverse = (scaled + norms.unsqueeze(-1)).reciprocal_()
    terms = inverse.square().mul_(squares)
    second = terms.sum(-1)
    return (second.sqrt() - 1) * second / terms.mul_(inverse).sum(-1)


def _solve_blocks(
    squares: Tensor, lengths: Tensor, limits: Tensor, of_blocks: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """The numbers q and 1 + t u [K, G] of each group after the step; q = 0 where it vanishes.

    limits: t, [K, G]. of_blocks: o, [B].
    """
    block, outer = groups.block_of_group, of_blocks[groups.block_of_group]
    zeros, ones = torch.zeros_like(limits), torch.ones_like(limits)
    second, third = _inverse_moments(squares, lengths, zeros, ones, groups)  # at q = 0, where u has a closed form
    excess = second.sqrt() - limits
    remaining = excess > 0
    excess = torch.where(remaining, excess, 1.0)
    block_excess = _over_blocks(torch.where(remaining, excess.square(), 0.0), groups).sqrt()
    remaining = remaining & (block_excess > of_blocks)[:, block]
    limits = torch.where(remaining, limits, 0.0)

    sums = groups.sums(squares)
    mean_lengths = groups.sums(squares * lengths) / sums
    guess = torch.where(remaining, sums.sqrt() - (limits + outer) * mean_lengths, 0.0).clamp_(min=0.0)
    scales = _over_blocks(guess.square(), groups).sqrt()[:, block] / outer
    slopes = third / second / excess  # of u at q = 0: a tangent of a concave function is above it
    inverses = torch.where(remaining, 1 / excess + slopes * scales, 1.0)
    scales, below = torch.where(remaining, scales, 0.0), zeros
    searching = remaining
    for _ in range(MOST_ITERATIONS):
        if not searching.any():
            break
        second, third = _inverse_moments(squares, lengths, scales, 1 + limits * inverses, groups)
        psi, by_scale = second.rsqrt(), third / second.pow(1.5)
        by_inverse = limits * (psi - scales * by_scale) / (1 + limits * inverses)
        slopes = torch.where(remaining, by_scale / (1 - by_inverse), 0.0)
        inverses_here = torch.where(remaining, inverses + (psi - inverses) / (1 - by_inverse), 1.0)
        powers = torch.where(remaining, inverses_here.pow(-2), 0.0)
        mean = _over_blocks(powers, groups).rsqrt()[:, block]
        mean_slope = mean.pow(3) * _over_blocks(powers / inverses_here * slopes, groups)[:, block]
        below = torch.maximum(below, torch.where(searching, scales + (1 / outer - mean) / mean_slope, 0.0))
        moved = torch.where(searching, inverses_here + slopes * (below - scales), inverses)
        changed = ((below - scales).abs() > TOLERANCE * below) | ((moved - inverses).abs() > TOLERANCE * moved)
        scales, inverses = torch.where(searching, below, scales), moved
        unfinished = _over_blocks((changed & searching).double(), groups) > 0
        searching = searching & unfinished[:, block]
    return scales, 1 + limits * inverses


def _inverse_moments(squares: Tensor, lengths: Tensor, a: Tensor, b: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """The sums over each group of x^2 / y^2 and x^2 / y^3 with y = a + b h; a, b: [K, G]."""
    inverse = torch.addcmul(groups.per_entry(a, 1.0), groups.per_entry(b, 0.0), lengths).reciprocal_()
    second = squares * inverse.square()
    return groups.sums(second), groups.sums(second.mul_(inverse))


def _shortened(x: Tensor, lengths: Tensor, a: Tensor, b: Tensor, groups: Groups) -> Tensor:
    """X [K, P] times a / (a + b h), with a and b [K, G] of each entry's group; entries without a group stay."""
    numerator = groups.per_entry(a, 1.0)
    return numerator / torch.addcmul(numerator, groups.per_entry(b, 0.0), lengths) * x


def _over_blocks(values: Tensor, groups: Groups) -> Tensor:
    """The sum over each block's groups, [K, G] -> [K, B]."""
    sums = values.new_zeros(len(values), len(groups.as_blocks.names))
    return sums.index_add_(1, groups.block_of_group, values)


def _lengths(steps: Tensor) -> Tensor:
    return steps.double().clamp_(min=SMALLEST)


def _limits(weight: Tensor, groups: Groups, clients: int) -> Tensor:
    """The limit t of each client's groups, [K, G]."""
    limits = weight.double() * groups.sqrt_sizes
    return torch.where(limits < SMALLEST, 0.0, limits).expand(clients, -1)
