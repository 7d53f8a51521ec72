"""Departures by persistence: a client leaves a parameter group when its deviation from the others agrees with itself.

Each round gives every client and group a *unit update* e = (theta - s) / ||theta - s||, which has no scale: learning
rate, schedule and a client's own rate drop out. Over rounds r the server sums, for clients j and k,

    E_k = sum_r e_k(r)        A_jk = sum_r <e_j(r), e_k(r)>        C_jk = number of rounds that both took part in

    M_jk = (<E_j, E_k> - A_jk) / (N_j N_k - C_jk)    products of different rounds: what is systematic, unbiased
    V_jk = A_jk / C_jk                               products within a round: systematic and noise

For c = (client k) - (weighted mean of the others that share the group), b2 = c'Mc and v = c'Vc, and rho = b2 / v says
how much the client's deviation agrees with itself from round to round: 0 by chance, 1 if it is always the same. In a
local quadratic model with noise sigma^2 a client alone costs sigma^2, and sharing among S with equal weights costs
((S - 1) / S)^2 b2 + sigma^2 / S where v = b2 + sigma^2 S / (S - 1): leaving pays exactly where rho > 1/2, for every S.
A client that has left a group does not come back: its updates begin elsewhere, and can no longer be compared.

Means are weighted by the weights of the present round; a client that is not in it counts as the average one that is.

K clients, G groups, D numbers of a sketched update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.averages import merge_without_departures, weighted_mean
from grpo_fed.aggregation.merge.distances import distances
from grpo_fed.aggregation.merge.records import Merged, Replies
from grpo_fed.policy.groups import Groups

PAYS = 0.5
"""A client in conflict has a rho above this: then leaving pays."""
MIN_ROUNDS = 4
"""Rounds of evidence before a client may leave anything; doubled with each departure."""
PRODUCTS = 200
"""Least evidence about a group: rounds x (rounds - 1) x its parameters. By chance rho has a standard deviation of about
sqrt(2 / products), so a group of few parameters takes more rounds."""
UPSTREAM = 2 / 3
"""Of the blocks with at least this part of a client's greatest rho, the one nearest the input is blamed."""
CUT = 2.0
"""An update longer than this many median norms is shortened to that."""
NUMBERS = 1 << 20
"""Numbers that the sketches of a group may take for all clients together."""
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the server knows of its clients' updates over the rounds."""

    clients: tuple[str, ...]
    """[K]: all clients of the federation, in the order of their names."""
    sums: Tensor
    """[K, D] float64: E, the sketched unit updates of all groups side by side, summed."""
    products: Tensor
    """[G, K, K] float64: A."""
    common: Tensor
    """[K, K] int64: C; on the diagonal N, the rounds that a client took part in since its evidence began."""
    departed: Tensor
    """[K, G] bool: the groups that each client has left."""
    departures: Tensor
    """[K] int64: how often each client has left something."""

    def rows(self, replies: Replies) -> Tensor:
        """Find the rows [n] int64 of the clients that replied."""
        row_of = {client: row for row, client in enumerate(self.clients)}
        return torch.tensor([row_of[reply.client] for reply in replies.all], dtype=torch.int64)


def no_evidence(clients: Sequence[str], groups: Groups) -> Evidence:
    """Make the evidence before the first round."""
    count, width = len(clients), int(_buckets(groups, len(clients)).sum())
    return Evidence(
        clients=tuple(sorted(clients)),
        sums=torch.zeros(count, width, dtype=torch.float64),
        products=torch.zeros(len(groups.names), count, count, dtype=torch.float64),
        common=torch.zeros(count, count, dtype=torch.int64),
        departed=torch.zeros(count, len(groups.names), dtype=torch.bool),
        departures=torch.zeros(count, dtype=torch.int64),
    )


def persistence(
    replies: Replies, shared: Tensor, groups: Groups, evidence: Evidence, ordered: bool = True
) -> tuple[Merged, Evidence, Tensor]:
    """Add a round to the evidence, let clients leave the groups in which they are in conflict, and merge the rest.

    The others' updates are averaged, each cut to twice the median norm of its group. Only clients that replied can
    leave: they learn of it with the answer's round. Return the merge, the evidence, and rho [K, G] against the clients
    that are not in conflict, NaN where a client is not compared.

    ordered: whether the blocks follow each other from input to output, so that the one nearest the input is blamed;
        otherwise a client leaves all groups in which it is in conflict at once.
    """
    evidence = add_round(evidence, replies, shared, groups)
    weights = torch.full((len(evidence.clients),), _average_weight(replies), dtype=torch.float64)
    present = torch.zeros(len(evidence.clients), dtype=torch.bool)
    rows = evidence.rows(replies)
    weights[rows] = torch.tensor([reply.weight for reply in replies.all], dtype=torch.float64)
    present[rows] = True
    rho, leaving = find_conflicts(evidence, groups, weights, present, ordered)
    evidence = _depart(evidence, leaving)
    return _merge(replies, shared, groups, evidence), evidence, rho


# Evidence ------------------------------------------------------------------------------------------------------------


def add_round(evidence: Evidence, replies: Replies, shared: Tensor, groups: Groups) -> Evidence:
    """Add the unit updates of a round's replies; in a group that a client has left it adds nothing."""
    if not replies.all:
        return evidence
    rows = evidence.rows(replies)
    buckets = _buckets(groups, len(evidence.clients))
    points = [reply.point for reply in replies.all]
    norms = distances(points, shared, groups)
    scale = torch.where((norms > TINY) & ~evidence.departed[rows], 1 / norms.clamp(min=TINY), 0.0)
    units = torch.stack([_sketch(point - shared, groups, len(evidence.clients)) for point in points])
    units *= scale.repeat_interleave(buckets, 1)
    sums, products, common = evidence.sums.clone(), evidence.products.clone(), evidence.common.clone()
    sums[rows] += units
    for group, part in enumerate(units.split(buckets.tolist(), 1)):
        products[group, rows[:, None], rows] += part @ part.mT
    common[rows[:, None], rows] += 1
    return replace(evidence, sums=sums, products=products, common=common)


def systematic(evidence: Evidence, groups: Groups) -> tuple[Tensor, Tensor]:
    """Compute M and V, [G, K, K] float64 each; 0 where two clients have no rounds to compare."""
    rounds = evidence.common.diagonal().double()
    pairs = rounds[:, None] * rounds - evidence.common
    parts = evidence.sums.split(_buckets(groups, len(evidence.clients)).tolist(), 1)
    across = torch.stack([part @ part.mT for part in parts]) - evidence.products
    between = torch.where(pairs > 0, across / pairs.clamp(min=1), 0.0)
    within = torch.where(evidence.common > 0, evidence.products / evidence.common.clamp(min=1), between)
    return between, within


def _average_weight(replies: Replies) -> float:
    """The average weight of the replies that have one."""
    weights = [reply.weight for reply in replies.weighted]
    return sum(weights) / len(weights) if weights else 1.0


# Conflicts -----------------------------------------------------------------------------------------------------------


def rounds_of_evidence(parameters: int) -> int:
    """Compute how many rounds a client takes part in before it may leave a group of so many parameters."""
    rounds = MIN_ROUNDS
    while rounds * (rounds - 1) * parameters < PRODUCTS:
        rounds += 1
    return rounds


def find_conflicts(
    evidence: Evidence, groups: Groups, weights: Tensor, candidates: Tensor, ordered: bool
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Find rho [K, G], and which groups each client in conflict leaves now: client -> [G] bool.

    1. Clients are compared that took part in `MIN_ROUNDS` rounds. One may leave if it is a candidate, took part in that
       many, doubled with each departure, and has `PRODUCTS` of evidence about the group.
    2. A client is accused if in some group its rho is above 1/2 and its systematic update opposes the mean of all that
       share the group, itself included: the merged step sets it back. Accused clients are set aside one by one, the
       greatest b2 first, and the others are compared with those that remain.
    3. An accused client is in conflict in the groups where its rho is above 1/2 and it opposes the others.
    4. Of the blocks with such groups it leaves the one nearest the input whose rho is at least 2/3 of its greatest.

    weights [K], candidates [K] bool.
    """
    between, within = systematic(evidence, groups)
    rounds, shares = evidence.common.diagonal(), ~evidence.departed
    is_compared = (rounds >= MIN_ROUNDS)[:, None] & shares
    products = (rounds * (rounds - 1))[:, None] * _buckets(groups, len(evidence.clients))
    may_leave = (candidates & (rounds >= MIN_ROUNDS * 2**evidence.departures))[:, None] & (products >= PRODUCTS)
    rho = torch.full(shares.shape, torch.nan, dtype=torch.float64)
    accused = torch.zeros_like(candidates)
    for group in range(len(groups.names)):
        comparison = _Comparison(between[group], within[group], weights, is_compared[:, group])
        aside = _set_aside(comparison, may_leave[:, group], including_itself=True)
        rho[:, group] = torch.where(aside.isnan(), comparison.rho, aside)
        accused |= ~aside.isnan()
    if not accused.any():
        return rho, {}
    strength = torch.full_like(rho, torch.nan)
    for group in range(len(groups.names)):
        comparison = _Comparison(between[group], within[group], weights, is_compared[:, group])
        strength[:, group] = _set_aside(comparison, accused & may_leave[:, group], including_itself=False)
    conflict = ~strength.isnan()
    return torch.where(conflict, strength, rho), {
        int(client): _blame(conflict[client], strength[client], groups, ordered)
        for client in conflict.any(1).nonzero().squeeze(1)
    }


class _Comparison:
    """Each client of a group against the weighted mean of the others that remain."""

    def __init__(self, between: Tensor, within: Tensor, weights: Tensor, clients: Tensor) -> None:
        self.between, self.within, self.weights = between, within, weights
        self.remaining = clients.clone()
        self.judge()

    def judge(self) -> None:
        """Compute b2, rho and the two signs, [K] each, against those that remain."""
        weights = self.weights * self.remaining
        self.b2, towards_others, towards_all = _deviation(self.between, weights)
        variance, _, _ = _deviation(self.within, weights)
        has_others = self.remaining & (weights.sum() - weights > 0)
        self.rho = torch.where(has_others, self.b2 / variance.clamp(min=TINY), torch.nan)
        self.opposes_others = has_others & (towards_others < 0)
        self.opposes_all = has_others & (towards_all < 0)


def _deviation(products: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every client k: c'Pc with c = e_k - mean of the others, <e_k, mean of the others> and <e_k, mean of all>.

    products P [K, K], weights [K] -> [K] each.
    """
    total, alone = weights.sum(), products.diagonal()
    with_all = products @ weights
    rest = (total - weights).clamp(min=TINY)
    with_others = (with_all - weights * alone) / rest
    of_others = (weights @ with_all - 2 * weights * with_all + weights**2 * alone) / rest**2
    return alone - 2 * with_others + of_others, with_others, with_all / total.clamp(min=TINY)


def _set_aside(comparison: _Comparison, candidates: Tensor, including_itself: bool) -> Tensor:
    """Set clients in conflict aside one by one, the greatest b2 first; return their rho, [K], NaN for the others.

    including_itself: whether conflict is with the mean of all or with that of the others.
    """
    aside = torch.full_like(comparison.b2, torch.nan)
    while True:
        opposes = comparison.opposes_all if including_itself else comparison.opposes_others
        conflict = candidates & opposes & (comparison.rho > PAYS)
        if not conflict.any():
            return aside
        first = int(torch.where(conflict, comparison.b2, -torch.inf).argmax())
        aside[first] = comparison.rho[first]
        comparison.remaining[first] = False
        comparison.judge()


def _blame(conflict: Tensor, strength: Tensor, groups: Groups, ordered: bool) -> Tensor:
    """Choose the groups [G] that a client leaves, of those in which it is in conflict: consequences lag, so it is the
    block nearest the input whose rho is close to the greatest.
    """
    if not ordered:
        return conflict
    enough = UPSTREAM * float(strength[conflict].max())
    block = next(
        groups.blocks[group] for group in range(len(groups.names)) if conflict[group] and strength[group] >= enough
    )
    return conflict & torch.tensor([name == block for name in groups.blocks])


def _depart(evidence: Evidence, leaving: Mapping[int, Tensor]) -> Evidence:
    """Let clients leave groups; all evidence about them begins again."""
    if not leaving:
        return evidence
    clients = torch.tensor(sorted(leaving))
    sums, products, common = evidence.sums.clone(), evidence.products.clone(), evidence.common.clone()
    departed, departures = evidence.departed.clone(), evidence.departures.clone()
    sums[clients] = 0
    products[:, clients] = 0
    products[:, :, clients] = 0
    common[clients] = 0
    common[:, clients] = 0
    departed[clients] |= torch.stack([leaving[int(client)] for client in clients])
    departures[clients] += 1
    return replace(evidence, sums=sums, products=products, common=common, departed=departed, departures=departures)


# The merge -----------------------------------------------------------------------------------------------------------


def _merge(replies: Replies, shared: Tensor, groups: Groups, evidence: Evidence) -> Merged:
    """Average the updates of the clients that share a group, each cut to twice the group's median norm."""
    departed = evidence.departed[evidence.rows(replies)]
    points = [reply.point for reply in replies.all]
    norms = distances(points, shared, groups)
    moving = ~departed & (norms > TINY) & torch.tensor([[reply.weight > 0] for reply in replies.all])
    limit = CUT * torch.where(moving, norms, torch.nan).nanmedian(0).values.nan_to_num(nan=torch.inf)
    factors = torch.where(norms > limit, limit / norms.clamp(min=TINY), 1.0)
    if not departed.any() and bool((factors == 1).all()):
        return merge_without_departures(replies, weighted_mean(replies.all, shared), groups)
    total = torch.zeros(len(shared), dtype=torch.float64)
    weight = torch.zeros(len(groups.names) + 1, dtype=torch.float64)
    for reply, factor, left in zip(replies.all, factors, departed, strict=True):
        shares = torch.cat([~left, torch.tensor([True])]).double() * reply.weight  # what is in no group is averaged
        total += (reply.point.double() - shared) * (shares * torch.cat([factor, factor.new_ones(1)]))[
            groups.ids_or_last
        ]
        weight += shares
    point = (shared + total / weight.clamp(min=TINY)[groups.ids_or_last]).float()
    away = distances(points, point, groups)
    return Merged(replies.clients, point, departed, torch.where(departed, away, 0.0).float())


# Sketches ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _buckets(groups: Groups, clients: int) -> Tensor:
    """[G] int64: numbers of each group's sketch: all of its parameters, or as many as all clients have room for."""
    return groups.sizes.long().clamp(max=max(64, NUMBERS // max(1, clients)))


@lru_cache(maxsize=8)
def _layout(groups: Groups, clients: int) -> tuple[Tensor, Tensor]:
    """The bucket [P] int64 and the sign [P] float64 of every parameter; one past the last bucket for none.

    A group that is larger than its sketch has its parameters added up in turn with random signs (a count sketch). An
    inner product of two unit vectors has a standard error of about 1 / sqrt(buckets) over signs; the signs are the same
    in all rounds, so it does not average out.
    """
    buckets = _buckets(groups, clients)
    starts = buckets.cumsum(0) - buckets
    signs = torch.ones(len(groups.ids), dtype=torch.float64)
    places = torch.full((len(groups.ids),), int(buckets.sum()), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for group in range(len(groups.names)):
        columns = (groups.ids == group).nonzero().squeeze(1)
        places[columns] = starts[group] + torch.arange(len(columns)) % buckets[group]
        if len(columns) > buckets[group]:
            signs[columns] = torch.randint(0, 2, (len(columns),), generator=generator).double() * 2 - 1
    return places, signs


def _sketch(update: Tensor, groups: Groups, clients: int) -> Tensor:
    """Sketch an update [P] -> [D] float64."""
    places, signs = _layout(groups, clients)
    width = int(_buckets(groups, clients).sum())
    return torch.zeros(width + 1, dtype=torch.float64).index_add_(0, places, update.double() * signs)[:-1]
