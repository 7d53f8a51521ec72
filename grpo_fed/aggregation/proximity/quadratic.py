"""The step as far as a diagonal Fisher matrix F allows: KL of a step d is predicted as 1/2 d'Fd, not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from grpo_fed.aggregation.proximity.records import AcceptedBlock, AcceptedStep, Budgets


def predicted_step(step: Tensor, fisher: Tensor, blocks: Mapping[str, slice], budgets: Budgets) -> AcceptedStep:
    """Shorten each block's step to its budget, and then all of them to the joint budget.

    With q_b = 1/2 d_b' F_b d_b, block b goes alpha_b = min(1, sqrt(budget_b / q_b)) of its step. Of all steps within
    the budget, alpha_b d_b is the nearest to d_b in the norm of F, in which the budget is a ball.

    step: [P], the merged point less the current one. fisher: [P], the diagonal of F. blocks: the columns of each.
    """
    assert list(blocks) == list(budgets.blocks), "a budget for each block, in their order"
    energy = 0.5 * fisher.double() * step.double().square()
    wanted = [float(energy[columns].sum()) for columns in blocks.values()]
    limits = list(budgets.blocks.values())
    alone = [fraction_within(q, limit) for q, limit in zip(wanted, limits, strict=True)]
    shrink = fraction_within(math.fsum(alpha**2 * q for alpha, q in zip(alone, wanted, strict=True)), budgets.joint)
    while True:
        alphas = [alpha * shrink for alpha in alone]
        kl = [alpha**2 * q for alpha, q in zip(alphas, wanted, strict=True)]
        if sum(kl) <= budgets.joint:
            break
        shrink = math.nextafter(shrink, 0.0)  # rounding
    rows = zip(blocks, wanted, limits, alphas, kl, strict=True)
    return AcceptedStep(tuple(AcceptedBlock(*row) for row in rows), sum(wanted), budgets.joint, sum(kl))


def fraction_within(kl: float, budget: float) -> float:
    """Return the fraction of a step that is within a budget if KL grows as its square; 0 with a budget of 0."""
    if budget == 0:
        return 0.0
    if kl <= budget:
        return 1.0
    alpha = math.sqrt(budget / kl)
    while alpha**2 * kl > budget:
        alpha = math.nextafter(alpha, 0.0)  # rounding
    return alpha
