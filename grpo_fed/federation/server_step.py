"""A round's step: how much of the way to the merge's target the shared blocks go, as `proximity.mode` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.rules import none_as_infinity
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

Measure = Callable[[Sequence[str], Sequence[StepFractions]], Mapping[str, Sequence[float]]]
"""Asks clients for the KL of trials, [M] each; says what those that answered found."""


@dataclass(frozen=True, eq=False)
class Move:
    """What goes where, [S] each."""

    old: Tensor
    new: Tensor
    weight: float
    """Of who goes there, where there are several."""


@dataclass(frozen=True)
class ServerStep:
    """What is made of a target."""

    accepted: AcceptedStep
    kl: Mapping[str, float] = field(default_factory=dict)
    """By client, the KL of this step as it measured it."""


def block_budgets(settings: ProximitySettings, commons: SharedBlocks) -> dict[str, float]:
    """KL budgets by block, as a run begins with them; ValueError for patterns that take no block, or one twice."""
    if not commons.size:
        return {}
    default = math.inf if settings.kl_block is None else settings.kl_block
    own = values_by_name(none_as_infinity(settings.blocks), commons.blocks, "proximity.blocks", "shared block")
    return dict.fromkeys(commons.blocks, default) | own


def choose_step(
    settings: ProximitySettings,
    blocks: Mapping[str, float],
    commons: SharedBlocks,
    ways: Sequence[Move],
    target: MergeTarget,
    measure: Measure,
) -> ServerStep:
    """How far to go.

    blocks: the budgets by block. ways: one for all, or one for each client that is merged into a cluster.
    """
    joint = math.inf if settings.kl_joint is None else settings.kl_joint
    budgets = Budgets(blocks, joint, settings.over)
    if settings.mode == "off":
        return ServerStep(full_step(blocks))
    if all(torch.equal(way.old, way.new) for way in ways):
        return ServerStep(_no_step(budgets))
    if settings.mode == "measured":
        return _measured(budgets, target.weights, measure)
    assert target.fisher is not None, "where the point moves, somebody has a weight and sent a Fisher diagonal"
    return ServerStep(predicted_step(_mean_square_step(ways), target.fisher, commons.slices, budgets))


def _no_step(budgets: Budgets) -> AcceptedStep:
    """The merge is where we are, and there is nothing to measure."""
    rows = (AcceptedBlock(block, 0.0, budget, 1.0, 0.0) for block, budget in budgets.blocks.items())
    return AcceptedStep(tuple(rows), 0.0, budgets.joint, 0.0)


def _measured(budgets: Budgets, weights: Mapping[str, float], measure: Measure) -> ServerStep:
    """As far as the clients allow. One that does not answer is not asked again; with none left there is no step."""
    search, asked = BudgetSearch(budgets, weights), tuple(weights)
    told: dict[StepFractions, dict[str, float]] = {}
    while trials := search.next_query():
        answers = measure(asked, trials) if asked else {}
        search, asked = search.with_answers(answers), tuple(answers)
        for number, trial in enumerate(trials):
            told[trial] = {name: kl[number] for name, kl in answers.items()}
    kept = search.accepted()
    return ServerStep(kept, told.get(kept.alphas, {}))


def _mean_square_step(ways: Sequence[Move]) -> Tensor:
    """[S]: the step whose KL, to a Fisher diagonal F, is the mean of all the steps' KL.

    With steps d_k that is the root of the weighted mean of d_k^2, entry by entry: then 1/2 d'Fd is the weighted mean of
    1/2 d_k'F d_k. Of one step alone it has the size.
    """
    if len(ways) == 1:
        return ways[0].new - ways[0].old
    total = math.fsum(way.weight for way in ways)
    squares = torch.zeros_like(ways[0].old, dtype=torch.float64)
    for way in ways:
        squares += (way.new.double() - way.old).square() * (way.weight / total)
    return squares.sqrt()


def with_measured_kl(
    kept: AcceptedStep, replies: Mapping[str, Trained], weights: Mapping[str, float], over: str
) -> AcceptedStep | None:
    """The last step with its KL as clients have measured it since, not as it was predicted; None if nobody has."""
    found = {name: reply.kl for name, reply in replies.items() if reply.kl is not None}
    total = math.fsum(weights[name] for name in found)
    if not found or (over == "mean" and total == 0):
        return None
    columns = zip(*found.values(), strict=True)
    if over == "worst":
        joint, *alone = [max(column) for column in columns]
    else:
        shares = [weights[name] / total for name in found]
        joint, *alone = [sum(s * kl for s, kl in zip(shares, column, strict=True)) for column in columns]
    blocks = tuple(replace(block, kl=kl) for block, kl in zip(kept.blocks, alone, strict=True))
    return replace(kept, blocks=blocks, joint=joint, clients=tuple(found))
