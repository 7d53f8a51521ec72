"""Finds the clients that a merge sets back, in the sums that evidence.py keeps.

Divide the clients that share a group into two sides, A and B, with weights a and b. With c = (mean of A) - (mean of B),
b2 = c'Mc is what is systematic in the difference, v = c'Vc has its noise as well, and rho = b2 / v says how much the
difference agrees with itself from round to round: 0 by chance, 1 if it is always the same. In a local quadratic model
with noise sigma^2, sharing costs side A (b / (a + b))^2 b2 + sigma^2 / (a + b) and merging among themselves
sigma^2 / a, where v = b2 + sigma^2 (1/a + 1/b): parting pays exactly where rho > 1/2, for both sides and sides of any
size, and all clients together gain ab / (a + b) (2 b2 - v) by it.

n clients of a group that are compared, K of a panel, G groups.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.evidence import TINY
from grpo_fed.policy.groups import Groups

PAYS = 0.5
"""Parting pays where rho is above this."""
OPPOSED = 0.5
"""Sides whose systematic updates have a cosine below minus this oppose each other."""
UPSTREAM = 2 / 3
"""Of the blocks with at least this part of a client's greatest rho, the one nearest the input is blamed."""


@dataclass(frozen=True, eq=False)
class Split:
    """Two sides of the clients of a group that should part."""

    side: Tensor
    """[n] bool: the side with less weight, or of two with equal weight the one that the merge sets back more."""
    rho: float
    gain: float


@dataclass(frozen=True, eq=False)
class Conflicts:
    """Names the clients in conflict, and the groups that they should leave."""

    rho: Tensor
    """[K, G] float64: rho of each client against the others that no split sets apart; NaN where it is not compared."""
    leaving: Tensor
    """[K, G] bool: the groups that clients in conflict should leave."""
    sides: Tensor
    """[K, G] int64: 0 for clients that no split sets apart, else the number of the split that did."""


def find_conflicts(
    between: Tensor,
    within: Tensor,
    weights: Tensor,
    compared: Tensor,
    has_evidence: Tensor,
    may_leave: Tensor,
    groups: Groups,
) -> Conflicts:
    """Find the clients in conflict, and what each of them should leave.

    1. In every group, clients are set apart split by split, as long as parting pays and the sides are in each other's
       way: the merged step, the mean of all, sets one of them back, or they oppose each other, by a cosine below -1/2.
       Those set apart in some group are suspects. Without enough evidence about a
       group a client is not set apart there: of hundreds of small groups some would divide any clients by chance.
    2. A suspect that may leave is compared with the clients that are no suspects, group by group. It is in conflict
       where its own rho is above 1/2 and its systematic update opposes theirs.
    3. Consequences lag: of the blocks of a chain in which it is in conflict it leaves the one nearest the input whose
       rho is at least 2/3 of its greatest in the chain, all groups in conflict there at once.

    between, within: M and V, [G, K, K]. weights: [K]. compared, has_evidence, may_leave: [K, G] bool.
    """
    sides, enough = torch.zeros(compared.shape, dtype=torch.int64), compared & has_evidence
    for group in range(len(groups.names)):
        sides[:, group] = _set_apart(between[group], within[group], weights, enough[:, group])
    suspects = (sides > 0).any(1)
    rho = torch.full(compared.shape, torch.nan, dtype=torch.float64)
    opposed = torch.zeros_like(compared)
    for group in range(len(groups.names)):
        others = weights * (compared[:, group] & ~suspects)
        rho[:, group], opposed[:, group] = _compare_each(between[group], within[group], others, compared[:, group])
    conflict = suspects[:, None] & has_evidence & may_leave & opposed & (rho > PAYS)
    leaving = torch.zeros_like(conflict)
    for client in conflict.any(1).nonzero().squeeze(1).tolist():
        leaving[client] = _blame(conflict[client], rho[client], groups)
    return Conflicts(rho, leaving, sides)


def rho_of_clients(between: Tensor, within: Tensor, weights: Tensor, compared: Tensor, suspects: Tensor) -> Tensor:
    """Compute rho [K, G] of each client that is compared [K, G] against those that are no suspects [K]."""
    rho = [
        _compare_each(between[group], within[group], weights * (here & ~suspects), here)[0]
        for group, here in enumerate(compared.unbind(1))
    ]
    return torch.stack(rho, 1)


def find_split(between: Tensor, within: Tensor, weights: Tensor) -> Split | None:
    """Find the two sides that gain most by parting; None if no sides gain, or none are in each other's way.

    There are 2^(n-1) ways to divide n clients. What they gain is a quadratic form in c, so a leading eigenvector orders
    the clients, and the sides that are tried are the clients up to each place in the order of the two first ones, and
    every client alone.

    between, within: M and V, [n, n]. weights: [n].
    """
    count, total = len(weights), weights.sum()
    if count < 2 or total <= 0:
        return None
    form = 2 * between - within
    centred = form - form.mean(0) - form.mean(1, keepdim=True) + form.mean()
    values, vectors = torch.linalg.eigh(centred)
    if values[-1] <= 0:
        return None
    sides = _candidate_sides(vectors)
    a, b = sides.double() @ weights, (~sides).double() @ weights
    first, second = _mean_weights(sides, weights), _mean_weights(~sides, weights)
    contrast = first - second
    b2, v = _form(between, contrast, contrast), _form(within, contrast, contrast)
    step_of_first, step_of_second, merged = first @ between, second @ between, weights / total
    of_first, of_second = (step_of_first * merged).sum(1), (step_of_second * merged).sum(1)
    # A side without weight moves nobody: it can be set back, but does not set back the other.
    set_back = of_first.minimum(of_second) < 0
    squares = (step_of_first * first).sum(1).clamp(min=0), (step_of_second * second).sum(1).clamp(min=0)
    lengths = squares[0].sqrt() * squares[1].sqrt()
    opposed = (step_of_first * second).sum(1) < -OPPOSED * lengths.clamp(min=TINY)
    pays = (set_back | opposed) & (v > TINY) & (b2 > PAYS * v)
    if not pays.any():
        return None
    share = torch.where((a > 0) & (b > 0), a * b / (a + b).clamp(min=TINY), weights[weights > 0].min() / 2)
    gain = torch.where(pays, share * (2 * b2 - v), -torch.inf)
    best = int(gain.argmax())
    is_lighter = bool(a[best] < b[best]) or (bool(a[best] == b[best]) and bool(of_first[best] <= of_second[best]))
    side = sides[best] if is_lighter else ~sides[best]
    return Split(side, float(b2[best] / v[best]), float(gain[best]))


def _candidate_sides(vectors: Tensor) -> Tensor:
    """The sides [m, n] bool to try, by the eigenvectors [n, n] of ascending eigenvalues."""
    count = len(vectors)
    below = torch.ones(count, count, dtype=torch.bool).tril()[: count - 1]
    ordered = [torch.zeros_like(below).index_copy(1, vectors[:, -1].argsort(stable=True), below)]
    if count > 2:
        ordered.append(torch.zeros_like(below).index_copy(1, vectors[:, -2].argsort(stable=True), below))
    return torch.cat([*ordered, torch.eye(count, dtype=torch.bool)])


def _mean_weights(sides: Tensor, weights: Tensor) -> Tensor:
    """The weights of each side's mean, [m, n]; equal ones for a side whose clients have none."""
    chosen = sides.double()
    weighted = chosen * weights
    has_weight = weighted.sum(1, keepdim=True) > 0
    weighted = torch.where(has_weight, weighted, chosen)
    return weighted / weighted.sum(1, keepdim=True).clamp(min=TINY)


def _form(products: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute left' P right for each row, [n, n], [m, n], [m, n] -> [m]."""
    return ((left @ products) * right).sum(1)


def _set_apart(between: Tensor, within: Tensor, weights: Tensor, compared: Tensor) -> Tensor:
    """Set sides apart until the clients that remain have no reason to part; number the splits from 1, [K] int64."""
    apart, remaining = torch.zeros(len(compared), dtype=torch.int64), compared.nonzero().squeeze(1)
    for number in itertools.count(1):
        pairs = remaining[:, None], remaining
        split = find_split(between[pairs], within[pairs], weights[remaining])
        if split is None:
            break
        apart[remaining[split.side]] = number
        remaining = remaining[~split.side]
    return apart


def _compare_each(between: Tensor, within: Tensor, others: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    """Compare each client with the weighted mean of the others: rho [K], NaN without comparison, and whether opposed.

    others: [K], the weights of those that clients are compared with.
    """
    has_others = compared & (others.sum() - others > TINY)
    average = _mean_of_others(others)
    b2, v = contrasts(between, within, others)
    rho = torch.where(has_others, b2 / v.clamp(min=TINY), torch.nan)
    return rho, has_others & ((average * between).sum(1) < 0)


def contrasts(between: Tensor, within: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Compute b2 and v, [K] each, of each client against the weighted mean of the others.

    between, within: M and V, [K, K]. others: [K], the weights of those that clients are compared with.
    """
    contrast = torch.eye(len(others), dtype=others.dtype) - _mean_of_others(others)
    return _form(between, contrast, contrast), _form(within, contrast, contrast)


def _mean_of_others(others: Tensor) -> Tensor:
    """The weights of the mean of the others, for each client, [K, K]."""
    rest = others.sum() - others
    average = (others - torch.diag(others)) / rest.clamp(min=TINY)[:, None]
    return average.fill_diagonal_(0.0)


def _blame(conflict: Tensor, rho: Tensor, groups: Groups) -> Tensor:
    """Choose the groups [G] that a client leaves, of those in which it is in conflict."""
    blamed = torch.zeros_like(conflict)
    chains = groups.chains or groups.blocks
    for chain in dict.fromkeys(chains):
        inside = conflict & torch.tensor([name == chain for name in chains])
        if not inside.any():
            continue
        enough = UPSTREAM * float(rho[inside].max())
        block = next(name for name, here, at in zip(groups.blocks, inside, rho, strict=True) if here and at >= enough)
        blamed |= inside & torch.tensor([name == block for name in groups.blocks])
    return blamed
