"""The step as far as a diagonal Fisher matrix allows, without asking anybody: KL = 1/2 d'Fd."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from grpo_fed.aggregation.proximity.records import AcceptedBlock, AcceptedStep, Budgets


def predicted_step(step: Tensor, fisher: Tensor, blocks: Mapping[str, slice], budgets: Budgets) -> AcceptedStep:
    """With q_b = 1/2 d_b' F_b d_b: alpha_b = min(1, sqrt(budget / q_b)), then one shrink for the joint budget.

    step, fisher: [P], the merged point less the current one and the Fisher matrix's diagonal. alpha_b d_b is what lies
    nearest to d_b, by F, of all that is within the block's budget: to shorten d_b is to project it onto an ellipsoid
    that is a ball to F.
    """
    assert list(blocks) == list(budgets.blocks), "a budget for each block, in their order"
    energy = 0.5 * fisher.double() * step.double().square()
    wanted = [float(energy[columns].sum()) for columns in blocks.values()]
    allowed = list(budgets.blocks.values())
    alone = [fraction_within(q, budget) for q, budget in zip(wanted, allowed, strict=True)]
    shrink = fraction_within(math.fsum(alpha**2 * q for alpha, q in zip(alone, wanted, strict=True)), budgets.joint)
    while True:
        alphas = [alpha * shrink for alpha in alone]
        kl = [alpha**2 * q for alpha, q in zip(alphas, wanted, strict=True)]
        if sum(kl) <= budgets.joint:
            break
        shrink = math.nextafter(shrink, 0.0)  # rounding
    rows = zip(blocks, wanted, allowed, alphas, kl, strict=True)
    return AcceptedStep(tuple(AcceptedBlock(*row) for row in rows), sum(wanted), budgets.joint, sum(kl))


def fraction_within(kl: float, budget: float) -> float:
    """How much of a step to make if its KL grows as its square; nothing with a budget of 0."""
    if budget == 0:
        return 0.0
    if kl <= budget:
        return 1.0
    alpha = math.sqrt(budget / kl)
    while alpha**2 * kl > budget:
        alpha = math.nextafter(alpha, 0.0)  # rounding
    return alpha
