"""A round's step: how far the shared blocks go towards the merge's target, as `proximity.mode` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.rules import none_as_infinity
from grpo_fed.aggregation.outliers import medians_of_others, weighted_median
from grpo_fed.aggregation.proximity import (
    AcceptedBlock,
    AcceptedStep,
    Budgets,
    BudgetSearch,
    StepFractions,
    full_step,
    predicted_step,
)
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.round_merge import MergeTarget
from grpo_fed.policy.patterns import values_by_name
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.settings import ProximitySettings

MeasureSteps = Callable[[Sequence[str], Sequence[StepFractions]], Mapping[str, Sequence[float]]]
"""Asks clients for the KL [M] of M steps, given as fractions of the way for each block; returns the answers."""

NOTED_APART = 100.0
"""How many times the others' median KL a client has to measure to be named."""
SHORT = 1e-3
"""The part of its way below which a block counts as not moved."""


@dataclass(frozen=True, eq=False)
class Move:
    """Describes a move of the shared blocks, [S] each."""

    old: Tensor
    """The shared blocks before the move."""
    new: Tensor
    """The shared blocks after the whole move."""
    weight: float
    """The weight of the clients that move like this, if there are several moves."""


@dataclass(frozen=True)
class ServerStep:
    """Holds the step towards a target that was accepted."""

    accepted: AcceptedStep
    """How far each block goes, and its KL."""
    kl: Mapping[str, float] = field(default_factory=dict)
    """The KL of this step as each client measured it."""
    notes: tuple[str, ...] = ()
    """Messages for a person."""


def block_budgets(settings: ProximitySettings, shared_blocks: SharedBlocks) -> dict[str, float]:
    """Find the KL budget of every shared block at the beginning of a run.

    ValueError for a pattern that matches no block, or a block that two patterns match.
    """
    if not shared_blocks.size:
        return {}
    default = math.inf if settings.kl_block is None else settings.kl_block
    patterns = none_as_infinity(settings.blocks)
    chosen = values_by_name(patterns, shared_blocks.blocks, "proximity.blocks", "shared block")
    return dict.fromkeys(shared_blocks.blocks, default) | chosen


def choose_step(
    settings: ProximitySettings,
    blocks: Mapping[str, float],
    shared_blocks: SharedBlocks,
    moves: Sequence[Move],
    target: MergeTarget,
    measure: MeasureSteps,
) -> ServerStep:
    """Choose how far every block goes, and note it if none does although there is a way to go.

    blocks: the blocks' KL budgets. moves: one for all, or one for each client that is merged into a cluster.
    """
    joint = math.inf if settings.kl_joint is None else settings.kl_joint
    budgets = Budgets(blocks, joint, settings.over)
    if settings.mode == "off":
        return ServerStep(full_step(blocks))
    if all(torch.equal(move.old, move.new) for move in moves):
        return ServerStep(_no_step(budgets))
    if settings.mode == "measured":
        return _measured(budgets, target.weights, measure)
    assert target.fisher is not None, "where the target moves, a client with a weight sent a Fisher diagonal"
    step = predicted_step(_mean_square_step(moves), target.fisher, shared_blocks.slices, budgets)
    return ServerStep(step, notes=_note_no_step(step))


def _no_step(budgets: Budgets) -> AcceptedStep:
    """Make the step of length 0, for a target where the shared blocks already are."""
    rows = (AcceptedBlock(block, 0.0, budget, 1.0, 0.0) for block, budget in budgets.blocks.items())
    return AcceptedStep(tuple(rows), 0.0, budgets.joint, 0.0)


def _measured(budgets: Budgets, weights: Mapping[str, float], measure: MeasureSteps) -> ServerStep:
    """Go as far as the clients' measurements allow.

    A client that does not answer a query is not asked again; if no client is left, there is no step.
    """
    search, clients = BudgetSearch(budgets, weights), tuple(weights)
    measured: dict[StepFractions, dict[str, float]] = {}
    while steps := search.next_query():
        answers = measure(clients, steps) if clients else {}
        search, clients = search.with_answers(answers), tuple(answers)
        for index, step in enumerate(steps):
            measured[step] = {name: kl[index] for name, kl in answers.items()}
    accepted = search.accepted()
    notes = (*_note_apart(search, accepted), *_note_no_step(accepted))
    return ServerStep(accepted, measured.get(accepted.alphas, {}), notes)


def _note_apart(search: BudgetSearch, accepted: AcceptedStep) -> Iterator[str]:
    """Name the clients whose KL was set aside, and those with far more than the others where a step is shortened."""
    for name, reason in search.set_aside.items():
        yield f"the KL of {name} is set aside: {reason}"
    whole = search.whole_kl
    if min(accepted.alphas, default=1.0) < 1:
        for name, median in medians_of_others(whole).items():
            if name not in search.set_aside and median < math.inf and whole[name] > NOTED_APART * median:
                yield f"{name} measures {whole[name] / median:.3g} times the others' median KL: {whole[name]:.3g}"


def _note_no_step(step: AcceptedStep) -> tuple[str, ...]:
    """Note that no block moves although its budget would let it."""
    may_move = [block for block in step.blocks if block.budget > 0]
    if not may_move or step.joint_budget == 0 or max(block.alpha for block in may_move) >= SHORT:
        return ()
    return (f"no block moved by {SHORT:g} of its way: the KL of every longer step was beyond its budget or unknown",)


def _mean_square_step(moves: Sequence[Move]) -> Tensor:
    """Compute the step [S] whose KL, by a Fisher diagonal F, is the weighted mean of the moves' KL.

    For moves d_k it is the root of the weighted mean of d_k^2, entry by entry: then 1/2 d'Fd is the weighted mean of
    1/2 d_k'F d_k.
    """
    if len(moves) == 1:
        return moves[0].new - moves[0].old
    total = math.fsum(move.weight for move in moves)
    squares = torch.zeros_like(moves[0].old, dtype=torch.float64)
    for move in moves:
        squares += (move.new.double() - move.old).square() * (move.weight / total)
    return squares.sqrt()


def with_measured_kl(
    step: AcceptedStep, replies: Mapping[str, Trained], weights: Mapping[str, float], over: str
) -> AcceptedStep | None:
    """Replace a step's predicted KL by that which clients measured afterwards; None if none did.

    over: whether the KL is the weighted `mean` over the clients, their weighted `median`, or that of the `worst`.
    """
    measured = {name: reply.kl for name, reply in replies.items() if reply.kl is not None}
    total = math.fsum(weights[name] for name in measured)
    if not measured or (over != "worst" and total == 0):
        return None
    columns = zip(*measured.values(), strict=True)
    if over == "worst":
        joint, *alone = [max(column) for column in columns]
    elif over == "median":
        joint, *alone = [weighted_median(column, [weights[name] for name in measured]) for column in columns]
    else:
        shares = [weights[name] / total for name in measured]
        joint, *alone = [sum(s * kl for s, kl in zip(shares, column, strict=True)) for column in columns]
    blocks = tuple(replace(block, kl=kl) for block, kl in zip(step.blocks, alone, strict=True))
    return replace(step, blocks=blocks, joint=joint, clients=tuple(measured))
