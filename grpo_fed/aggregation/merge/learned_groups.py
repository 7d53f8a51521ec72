"""Learns which units of a block clients can share: groups of parameters, by how clients differ on them.

Where `policy.groups` is "learned" a block is cut into units, the rows or columns of its weights, and a client's update
of the whole block is made a unit update. So what evidence.py sums for the units of a block adds up to that for the
block: for a client against the mean of the others, b2 and v of a group are the sums of those of its units, and so

    rho of a group = sum_u b2_u / sum_u v_u.

All units of a block begin as one group, which is divided where both is true for a client:

- its rho differs between the units by more than chance: the rho of a unit with n parameters has by chance, after r
  rounds, a variance of about 2 / (r (r - 1) n), and the squared differences from the group's, each over that variance,
  sum to more than by chance (Cochran's Q);
- it matters: of the two parts that differ most parting pays for one, rho > 1/2, and not for the other.

Groups are learned anew in every round from the evidence of all rounds, so they need no state of their own. A client
leaves a learned group as it leaves any other (conflicts.py), and what it has left are the group's units.

K clients of a panel, U units, L learned groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.conflicts import PAYS, contrasts
from grpo_fed.aggregation.merge.evidence import TINY
from grpo_fed.policy.groups import Groups

DIFFERS = 4.0
"""Standard deviations of Cochran's Q beyond its mean from which the units of a group differ by more than chance."""


@dataclass(frozen=True, eq=False)
class UnitEvidence:
    """What is known of U units, or of the groups that are made of them."""

    between: Tensor
    """[U, K, K] float64: M, as in evidence.py."""
    within: Tensor
    """[U, K, K] float64: V."""
    shares: Tensor
    """[K, U] bool: whether a client shares a unit, and has not left it."""
    enough: Tensor
    """[K] bool: whether there are enough rounds of a client to compare it."""
    pairs: Tensor
    """[K] int64: each client's pairs of different rounds, r (r - 1)."""
    numbers: Tensor
    """[U] int64: how many numbers are kept of each unit: its parameters, or those of their sketch."""

    @property
    def compared(self) -> Tensor:
        """[K, U] bool: the clients that are compared in each unit."""
        return self.shares & self.enough[:, None]


@dataclass(frozen=True, eq=False)
class LearnedGroups:
    """L groups that were learned of U units."""

    group_of_unit: Tensor
    """[U] int64: the number of each unit's group."""
    groups: Groups
    """The learned groups; one is named like its first unit."""
    evidence: UnitEvidence
    """What is known of them."""


def learn_groups(units: UnitEvidence, weights: Tensor, groups: Groups) -> LearnedGroups:
    """Learn which units form a group.

    A group that lies in no learned block is a group by itself. Units that are not shared by the same clients are never
    in one group.

    weights: [K], of the clients.
    """
    if not groups.learned:
        return LearnedGroups(torch.arange(len(groups.names)), groups, units)
    labels = torch.zeros(len(groups.names), dtype=torch.int64)
    b2, v = _client_statistics(units, weights)
    count = 0
    for part in _first_parts(units.shares, groups):
        clients = units.compared[:, part[0]]
        precision = units.pairs[clients][:, None] * units.numbers[part].double() / 2
        kinds = _divide(b2[clients][:, part], v[clients][:, part], precision)
        labels[part] = kinds + count
        count += int(kinds.max()) + 1
    return _pool(labels, groups, units)


def _pool(labels: Tensor, groups: Groups, units: UnitEvidence) -> LearnedGroups:
    """Make groups of units with the same label, 0 to L - 1, and add up what is known of them."""
    firsts = [int((labels == label).nonzero()[0]) for label in range(int(labels.max()) + 1)]

    def pooled(values: Tensor) -> Tensor:
        return values.new_zeros(len(firsts), *values.shape[1:]).index_add_(0, labels, values)

    return LearnedGroups(
        labels,
        Groups(
            names=tuple(groups.names[first] for first in firsts),
            ids=torch.cat([labels, labels.new_tensor([-1])])[groups.ids_or_last],
            sizes=pooled(groups.sizes),
            blocks=tuple(groups.blocks[first] for first in firsts),
            chains=tuple(groups.chains[first] for first in firsts) if groups.chains else (),
        ),
        UnitEvidence(
            pooled(units.between),
            pooled(units.within),
            units.shares[:, firsts],
            units.enough,
            units.pairs,
            pooled(units.numbers),
        ),
    )


def _first_parts(shares: Tensor, groups: Groups) -> list[Tensor]:
    """Divide the units by block, and by who shares them; a group of no learned block is a part by itself."""
    parts: dict[tuple[object, ...], list[int]] = {}
    for unit, block in enumerate(groups.blocks):
        key = (block, *shares[:, unit].tolist()) if block in groups.learned else (unit,)
        parts.setdefault(key, []).append(unit)
    return [torch.tensor(part) for part in parts.values()]


def _client_statistics(units: UnitEvidence, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute b2 and v of each client against the mean of all others that are compared in a unit, [K, U] each."""
    both = [
        contrasts(between, within, weights * here)
        for between, within, here in zip(units.between, units.within, units.compared.unbind(1), strict=True)
    ]
    return torch.stack([b2 for b2, _ in both], 1), torch.stack([v for _, v in both], 1)


def _divide(b2: Tensor, v: Tensor, precision: Tensor) -> Tensor:
    """Divide a group of units as long as one of its parts differs by more than chance and it matters; [u] int64."""
    labels = torch.zeros(b2.shape[1], dtype=torch.int64)
    side = _best_side(b2, v, precision)
    if side is not None:
        labels[~side] = _divide(b2[:, ~side], v[:, ~side], precision[:, ~side])
        labels[side] = _divide(b2[:, side], v[:, side], precision[:, side]) + labels.max() + 1
    return labels


def _best_side(b2: Tensor, v: Tensor, precision: Tensor) -> Tensor | None:
    """Find the units, [u] bool, that should be a group of their own, by the client whose rho differs most."""
    clients, units = b2.shape
    best, found = DIFFERS, None
    for client in range(clients):
        if units < 2 or float(v[client].sum()) <= TINY:
            continue
        rho = b2[client] / v[client].clamp(min=TINY)
        weight = precision[client] * (v[client] > TINY)
        squares, side = _two_means(rho, weight)
        z = (squares - (units - 1)) / (2 * (units - 1)) ** 0.5
        rest = ~side
        high = float(b2[client, side].sum() / v[client, side].sum().clamp(min=TINY))
        low = float(b2[client, rest].sum() / v[client, rest].sum().clamp(min=TINY))
        if z > best and high > PAYS >= low:
            best, found = z, side
    return found


def _two_means(values: Tensor, weight: Tensor) -> tuple[float, Tensor]:
    """Compute Cochran's Q of values [u], and the upper side [u] bool of the cut that explains most of it."""
    total = weight.sum().clamp(min=TINY)
    q = float((weight * (values - (weight * values).sum() / total).square()).sum())
    order = values.argsort(stable=True)
    below = (weight[order].cumsum(0))[:-1]
    sums = ((weight * values)[order].cumsum(0))[:-1]
    above, sum_above = total - below, (weight * values).sum() - sums
    explained = sums.square() / below.clamp(min=TINY) + sum_above.square() / above.clamp(min=TINY)
    side = torch.zeros(len(values), dtype=torch.bool)
    side[order[int(explained.argmax()) + 1 :]] = True
    return q, side
