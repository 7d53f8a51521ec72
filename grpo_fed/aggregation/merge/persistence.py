"""Departures by persistence: a client leaves a parameter group when its deviation from the others agrees with itself.

evidence.py sums up the clients' updates over the rounds, and conflicts.py finds in it whom the merge sets back. Such a
client leaves at once, or is asked first to play with its own parameters and with the shared ones (`confirm`) and leaves
unless the shared ones are no worse. One that has left is asked the same from time to time (`rejoin`), and comes back if
they are no worse. Each decision begins the client's evidence anew and doubles the rounds of evidence for the next, so
that nobody goes to and fro.

A client whose returns fall by most of what it had learned has another task now. What was seen before would hide that
for as long as it had lasted, so its evidence begins anew; and if its returns have not risen again after four rounds it
is in conflict with all that it shares, unless half of the clients have fallen, which says nothing about one of them.

Means are weighted by the weights of the present round; a client that is not in it counts as the average one that is.

K clients of a panel, G groups, P parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.averages import weighted_mean
from grpo_fed.aggregation.merge.conflicts import Conflicts, find_conflicts, rho_of_clients
from grpo_fed.aggregation.merge.distances import contiguous_groups
from grpo_fed.aggregation.merge.evidence import (
    LEAST_EVIDENCE,
    TINY,
    Evidence,
    Panel,
    add_round,
    begin_anew,
    least_pairs,
    measure_updates,
    parts_of,
    sketch_sizes,
    systematic,
)
from grpo_fed.aggregation.merge.learned_groups import LearnedGroups, UnitEvidence, learn_groups
from grpo_fed.aggregation.merge.records import Merged, Replies
from grpo_fed.policy.groups import Groups

MIN_ROUNDS = 4
"""Rounds of evidence before a client may leave anything; doubled with each decision about it."""
MOST_ROUNDS = 32
"""Rounds of evidence that are always enough, however many decisions there were."""
AFTER_A_FALL = 8
"""Rounds of evidence that a fall in returns can discard: a client that reports a fall in every round would otherwise
never be judged."""
CUT = 2.0
"""An update longer than this many median norms is shortened to that."""


@dataclass(frozen=True)
class Asking:
    """When clients are asked to play with their own parameters and with the shared ones."""

    confirm: bool = False
    """Whether a client in conflict is asked before it leaves."""
    rejoin: int = 0
    """Rounds of a client from when it left until it is asked to come back, and between two such times; 0 for never."""


@dataclass(frozen=True)
class Heard:
    """What clients reported in a round besides their parameters."""

    shares: Mapping[str, bool] = field(default_factory=dict)
    """For each client that was asked: whether it began the round with the shared parameters, as they are no worse."""
    low: Collection[str] = ()
    """The clients that have lost most of what they had learned, by their returns of this round."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What was decided in a merge. By client; groups as numbers, with the rho of the conflict."""

    rho: Mapping[str, Tensor] = field(default_factory=dict)
    """[G] float64 each: against the clients that are no suspects, from a client's second round on, before it may leave
    anything; NaN where it is not compared."""
    left: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """The groups that clients left."""
    returned: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """The groups that clients came back to, with the rho with which they had left."""
    stayed: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """The groups that clients in conflict stay in since the shared parameters are no worse."""


def persistence(
    replies: Replies,
    shared: Tensor,
    groups: Groups,
    evidence: Evidence,
    asking: Asking = Asking(),
    heard: Heard = Heard(),
) -> tuple[Merged, Evidence, Findings]:
    """Add a round to the evidence, let clients leave the groups in which they are in conflict, and merge the rest.

    The others' updates are averaged, each cut to twice the median norm of its group. Only clients that replied can
    leave or be asked: they learn of it with their next instruction.
    """
    average = average_weight(replies)
    norms: dict[str, Tensor] = {}
    panels: list[Panel] = []
    all_findings: list[Findings] = []
    for before, part in parts_of(evidence, replies):
        panel, settled = settle(before, heard.shares)
        updates = measure_updates(part, shared, groups, len(panel.clients))
        norms.update(zip(part.clients, updates.norms, strict=True))
        panel = add_round(_note_falls(panel, part.clients, heard.low), part, updates, groups)
        weights = torch.full((len(panel.clients),), average, dtype=torch.float64)
        weights[panel.rows(part.clients)] = torch.tensor([reply.weight for reply in part.all], dtype=torch.float64)
        conflicts = judge(panel, weights, part.clients, groups)
        panel, left = _ask_or_leave(panel, conflicts, asking.confirm)
        panels.append(_ask_to_return(panel, part.clients, groups, asking.rejoin))
        rho = dict(zip(panel.clients, conflicts.rho, strict=True))
        all_findings.append(Findings(rho, {**settled.left, **left}, settled.returned, settled.stayed))
    evidence, all_norms = Evidence(tuple(panels)), torch.stack([norms[client] for client in replies.clients])
    return _merge(replies, shared, groups, evidence, all_norms), evidence, join_findings(all_findings)


def judge(panel: Panel, weights: Tensor, present: Collection[str], groups: Groups) -> Conflicts:
    """Find the clients in conflict, by all evidence of a panel.

    Clients are compared that took part in `MIN_ROUNDS` rounds; people who watch see a rho from the second round on. One
    may leave if it is present, is not asked already, took part in that many rounds, doubled with each decision about
    it, and has enough evidence about the group. One with another task leaves everything, and a newcomer is asked
    whether it has another one.

    weights: [K].
    """
    needed = (MIN_ROUNDS * 2.0**panel.decisions).clamp(max=MOST_ROUNDS)
    is_present = torch.tensor([client in set(present) for client in panel.clients])
    may_leave = is_present & (panel.rounds >= needed) & ~panel.asked.any(1)
    between, within = systematic(panel, groups)
    pairs, numbers = panel.rounds * (panel.rounds - 1), sketch_sizes(groups, len(panel.clients))
    units = UnitEvidence(between, within, ~panel.departed, panel.rounds >= MIN_ROUNDS, pairs, numbers)
    learned = learn_groups(units, weights, groups)
    conflicts, rho = _judge_groups(panel, learned, weights, may_leave)
    has_another_task = may_leave & panel.fallen & bool(2 * panel.fallen.sum() < len(panel.clients))
    has_another_task |= may_leave & panel.newcomers
    return Conflicts(
        rho[:, learned.group_of_unit],
        conflicts.leaving[:, learned.group_of_unit] & ~panel.departed | (has_another_task[:, None] & ~panel.departed),
        conflicts.sides[:, learned.group_of_unit],
    )


def _judge_groups(panel: Panel, learned: LearnedGroups, weights: Tensor, may_leave: Tensor) -> tuple[Conflicts, Tensor]:
    """Find the conflicts in learned groups, and rho [K, L] with that of clients that are not compared yet.

    may_leave: [K] bool.
    """
    units = learned.evidence
    is_compared, observed = units.compared, (panel.rounds >= 2)[:, None] & units.shares
    conflicts = find_conflicts(
        units.between,
        units.within,
        weights,
        is_compared,
        units.pairs[:, None] >= least_pairs(units.numbers),
        may_leave[:, None].expand_as(is_compared),
        learned.groups,
    )
    rho = conflicts.rho
    if bool((observed & ~is_compared).any()):
        early = rho_of_clients(units.between, units.within, weights, observed, (conflicts.sides > 0).any(1))
        rho = torch.where(rho.isnan(), early, rho)
    return conflicts, rho


def average_weight(replies: Replies) -> float:
    """Compute the average weight of the replies that have one."""
    weights = [reply.weight for reply in replies.weighted]
    return sum(weights) / len(weights) if weights else 1.0


def rounds_of_evidence(parameters: int) -> int:
    """Compute how many rounds a client takes part in before it may leave a group of so many parameters."""
    rounds = MIN_ROUNDS
    while rounds * (rounds - 1) * parameters < LEAST_EVIDENCE:
        rounds += 1
    return rounds


# Decisions -----------------------------------------------------------------------------------------------------------


def settle(panel: Panel, shares: Mapping[str, bool]) -> tuple[Panel, Findings]:
    """Decide by the answers of clients that were asked: they leave, stay, or come back."""
    answered = [client for client in panel.clients if client in shares and client in panel.asked_clients]
    left: dict[str, Mapping[int, float]] = {}
    returned: dict[str, Mapping[int, float]] = {}
    stayed: dict[str, Mapping[int, float]] = {}
    departed, asked, waiting = panel.departed.clone(), panel.asked.clone(), panel.waiting.clone()
    rho, newcomers, decided = panel.rho.clone(), panel.newcomers.clone(), []
    for client in answered:
        row = panel.clients.index(client)
        groups = asked[row].clone()
        had_left = bool((departed[row] & groups).any())
        values = _values(rho[row], groups)
        asked[row] = newcomers[row] = False
        if shares[client] or not had_left:
            decided.append(row)
        if not shares[client] and not had_left:
            left[client], waiting[row] = values, 0
            departed[row] |= groups
        elif shares[client]:
            (returned if had_left else stayed)[client] = values
            departed[row] &= ~groups
            rho[row, groups] = torch.nan
    panel = replace(panel, departed=departed, asked=asked, waiting=waiting, rho=rho, newcomers=newcomers)
    return _count_decisions(panel, decided), Findings({}, left, returned, stayed)


def _ask_or_leave(panel: Panel, conflicts: Conflicts, confirm: bool) -> tuple[Panel, dict[str, dict[int, float]]]:
    """Ask the clients in conflict, or let them leave; return what they left."""
    rows = conflicts.leaving.any(1).nonzero().squeeze(1).tolist()
    if not rows:
        return panel, {}
    rho = torch.where(conflicts.leaving, conflicts.rho, panel.rho)
    if confirm:
        return replace(panel, asked=panel.asked | conflicts.leaving, rho=rho), {}
    waiting = panel.waiting.clone()
    waiting[rows] = 0
    panel = replace(panel, departed=panel.departed | conflicts.leaving, rho=rho, waiting=waiting)
    left = {panel.clients[row]: _values(rho[row], conflicts.leaving[row]) for row in rows}
    return _count_decisions(panel, rows), left


def _ask_to_return(panel: Panel, present: Collection[str], groups: Groups, rejoin: int) -> Panel:
    """Ask clients that have waited for long enough to come back: to all that they have left, and every other time to
    one block of it, the blocks taking turns.
    """
    if not rejoin:
        return panel
    asked, waiting, tried = panel.asked.clone(), panel.waiting.clone(), panel.returns_tried.clone()
    for row, client in enumerate(panel.clients):
        departed = panel.departed[row]
        if client not in present or not departed.any() or asked[row].any() or waiting[row] < rejoin:
            continue
        blocks = list(dict.fromkeys(name for name, left in zip(groups.blocks, departed, strict=True) if left))
        number = int(tried[row])
        chosen = blocks if number % 2 == 0 else [blocks[number // 2 % len(blocks)]]
        asked[row] = departed & torch.tensor([name in chosen for name in groups.blocks])
        waiting[row], tried[row] = 0, number + 1
    return replace(panel, asked=asked, waiting=waiting, returns_tried=tried)


def _note_falls(panel: Panel, present: Collection[str], low: Collection[str]) -> Panel:
    """Begin the evidence anew of clients whose returns fell, if there are enough rounds of it; note who rose again."""
    fallen = panel.fallen.clone()
    rows = []
    for row, client in enumerate(panel.clients):
        if client in low and not fallen[row] and panel.rounds[row] >= AFTER_A_FALL:
            rows.append(row)
        elif client in present and client not in low:
            fallen[row] = False
    panel = begin_anew(panel, torch.tensor(rows, dtype=torch.int64)) if rows else panel
    fallen[rows] = True
    return replace(panel, fallen=fallen)


def _values(rho: Tensor, chosen: Tensor) -> dict[int, float]:
    """Return rho [G] of the chosen groups [G] bool, by the groups' numbers."""
    return {group: float(rho[group].nan_to_num()) for group in chosen.nonzero().squeeze(1).tolist()}


def _count_decisions(panel: Panel, rows: list[int]) -> Panel:
    """Count a decision about each of these clients, and begin their evidence anew."""
    if not rows:
        return panel
    clients = torch.tensor(rows, dtype=torch.int64)
    decisions = panel.decisions.clone()
    decisions[clients] += 1
    return replace(begin_anew(panel, clients), decisions=decisions)


def join_findings(parts: Iterable[Findings]) -> Findings:
    """Join the findings about different clients."""
    joined = Findings()
    for part in parts:
        joined = Findings(
            {**joined.rho, **part.rho},
            {**joined.left, **part.left},
            {**joined.returned, **part.returned},
            {**joined.stayed, **part.stayed},
        )
    return joined


# The merge -----------------------------------------------------------------------------------------------------------


def _merge(replies: Replies, shared: Tensor, groups: Groups, evidence: Evidence, norms: Tensor) -> Merged:
    """Average the updates of the clients that share a group, each cut to twice the group's median norm.

    norms: of the updates, [K, G].
    """
    rows = {client: row for each in evidence.panels for client, row in zip(each.clients, each.departed, strict=True)}
    departed = torch.stack([rows[client] for client in replies.clients])
    moving = ~departed & (norms > TINY) & torch.tensor([[reply.weight > 0] for reply in replies.all])
    limit = CUT * torch.where(moving, norms, torch.nan).nanmedian(0).values.nan_to_num(nan=torch.inf)
    factors = torch.where(norms > limit, limit / norms.clamp(min=TINY), 1.0)
    no_deviations = torch.zeros_like(norms, dtype=torch.float32)
    shares = ~departed * torch.tensor([[reply.weight] for reply in replies.all], dtype=torch.float64)
    if any(reply.start is not None for reply in replies.all):
        point, affected = shared.clone(), torch.ones_like(departed[0])  # s + the mean of updates, in all groups
        point += weighted_mean([replace(reply, point=reply.update(shared)) for reply in replies.all], 0 * shared)
    else:
        point, affected = weighted_mean(replies.all, shared), (departed | (factors != 1)).any(0)
    places = contiguous_groups(groups)
    if places is not None:
        for group in affected.nonzero().squeeze(1).tolist():
            columns = places[group]
            part = _mean_update(replies, shared, columns, shares[:, group] * factors[:, group], shares[:, group])
            point[columns] = (shared[columns] + part).float()
    elif affected.any():
        is_affected = torch.cat([affected, affected.new_zeros(1)])[groups.ids_or_last]
        part = _mean_scattered_update(replies, shared, shares * factors, shares, groups)
        point = torch.where(is_affected, (shared + part).float(), point)
    return Merged(replies.clients, point, departed, no_deviations)


def _mean_update(replies: Replies, shared: Tensor, columns: slice, pulls: Tensor, shares: Tensor) -> Tensor:
    """Average updates in some columns [n], each times its pull [K], by the sum of the shares [K]; 0 without shares."""
    total = torch.zeros(shared[columns].shape, dtype=torch.float64)
    for reply, pull in zip(replies.all, pulls.tolist(), strict=True):
        if pull:
            begin = shared if reply.start is None else reply.start
            total.add_(reply.point[columns] - begin[columns], alpha=pull)
    return total / shares.sum().clamp(min=TINY)


def _mean_scattered_update(replies: Replies, shared: Tensor, pulls: Tensor, shares: Tensor, groups: Groups) -> Tensor:
    """Average updates [P] of groups that do not follow each other; pulls, shares: [K, G]."""
    total = torch.zeros(len(shared), dtype=torch.float64)
    for reply, pull in zip(replies.all, pulls, strict=True):
        total += reply.update(shared) * torch.cat([pull, pull.new_zeros(1)])[groups.ids_or_last]
    weight = torch.cat([shares.sum(0), shares.new_ones(1)]).clamp(min=TINY)
    return total / weight[groups.ids_or_last]
