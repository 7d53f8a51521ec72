"""Keeping an update near the policy it began from: KL weights and limits that adapt, and budgets for each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fed.policy.blocks import Block, Layout
from grpo_fed.policy.patterns import values_by_name

LEAST_COEFFICIENT, MOST_COEFFICIENT = 1e-6, 1e6
SAFETY, TRIES = 0.95, 12


def adapt_coefficient(coefficient: Tensor, kl: Tensor, target: float) -> Tensor:
    """Double a KL weight [K] where the KL came out over 1.5 targets, halve it below a 1.5th (1707.06347, section 4)."""
    doubled = torch.where(kl > 1.5 * target, coefficient * 2, coefficient)
    adapted = torch.where(kl < target / 1.5, coefficient / 2, doubled)
    return adapted.clamp(LEAST_COEFFICIENT, MOST_COEFFICIENT)


def adapt_limit(limit: Tensor, gain: Tensor, predicted: Tensor, target: float) -> Tensor:
    """Widen a hard KL limit [K] by half where a step gained at least 3/4 of what was predicted, halve it below 1/4.

    The classical trust-region rule (Nocedal & Wright, Numerical Optimization, algorithm 4.1); it stays within a factor
    of 10 around the scenario's target. Where nothing was predicted, nothing is learned of the limit.
    """
    ratio = torch.where(predicted > 1e-12, gain / predicted, 0.5)
    adapted = torch.where(ratio < 0.25, limit / 2, torch.where(ratio > 0.75, limit * 1.5, limit))
    return adapted.clamp(target / 10, target * 10)


@dataclass(frozen=True)
class ShortenedBlock:
    """How much of one block's step was kept."""

    block: str
    alpha: Tensor
    """[K]: part of the step that was kept."""
    wanted: Tensor
    """[K]: KL of the policy if this block alone had made its whole step."""
    kl: Tensor
    """[K]: KL with this block alone moved by what was kept."""
    budget: float


def trust_budgets(layout: Layout, given: Mapping[str, float]) -> list[tuple[Block, float]]:
    """The blocks that `trust.blocks` speaks of with their budgets; ValueError where two of its patterns take one."""
    blocks = {block.name: block for block in layout.blocks}
    budgets = values_by_name(given, list(blocks), "trust.blocks", "block")
    return [(blocks[name], budget) for name, budget in budgets.items()]


def shorten_to_budgets(
    measure: Callable[[Tensor], Tensor], old: Tensor, new: Tensor, budgets: Sequence[tuple[Block, float]]
) -> tuple[Tensor, list[ShortenedBlock]]:
    """Shorten each block's step until the KL with that block alone moved is within its budget.

    `measure(parameters [K, P]) -> KL [K]` from the old policy; old and new are [K, P]. Hidden layers are not convex in
    KL, so the step is measured again after each shortening and is 0 if no shortening helps; what is returned was
    measured.
    """
    kept, steps = new.clone(), []
    for block, budget in budgets:
        columns = slice(block.start, block.stop)

        def moved(alpha: Tensor, columns: slice = columns) -> Tensor:
            candidate = old.clone()
            candidate[:, columns].lerp_(new[:, columns], alpha[:, None])
            return candidate

        step = _shorten(lambda alpha, moved=moved: measure(moved(alpha)), old.shape[0], budget, block.name, old)  # type: ignore[misc]
        steps.append(step)
        short = step.alpha < 1
        kept[:, columns] = torch.where(short[:, None], moved(step.alpha)[:, columns], new[:, columns])
    return kept, steps


def _shorten(
    measure: Callable[[Tensor], Tensor], clients: int, budget: float, name: str, like: Tensor
) -> ShortenedBlock:
    """Shorten by sqrt(budget / KL), exact where the KL is quadratic, until it fits."""
    alpha = torch.ones(clients, device=like.device, dtype=like.dtype)
    kl = wanted = measure(alpha)
    for _ in range(TRIES):
        over = ~(kl <= budget)
        if not over.any():
            break
        shorter = alpha * SAFETY * (budget / kl).sqrt().nan_to_num(0.5).clamp(max=0.95)
        alpha = torch.where(over, shorter, alpha)
        kl = torch.where(over, measure(alpha), kl)
    over = ~(kl <= budget)
    return ShortenedBlock(name, alpha.masked_fill(over, 0.0), wanted, kl.masked_fill(over, 0.0), budget)
