"""What limits a step of the shared blocks, and what became of it. B blocks, P parameters of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

StepFractions: TypeAlias = tuple[float, ...]
"""[B]: alpha of each block, the part of its step that it makes."""


@dataclass(frozen=True)
class Budgets:
    """How much KL from the current shared policy is allowed; 0 moves nothing, infinity is no limit."""

    blocks: Mapping[str, float]
    """For each shared block, with it alone moved."""
    joint: float = math.inf
    """With all of them moved."""
    over: Literal["mean", "worst"] = "mean"
    """Of the clients' KL: their weighted mean, or the greatest."""


@dataclass(frozen=True)
class AcceptedBlock:
    """What became of one block's step. A KL is None where nobody measured it."""

    block: str
    wanted: float | None
    """KL of the policy if this block alone had made its whole step."""
    budget: float
    alpha: float
    """Part of the step that is made."""
    kl: float | None
    """KL with this block alone moved by that part."""


@dataclass(frozen=True)
class AcceptedStep:
    """What became of a step."""

    blocks: tuple[AcceptedBlock, ...]
    """[B]."""
    joint_wanted: float | None
    """KL of the policy if all blocks had made their whole steps."""
    joint_budget: float
    joint: float | None
    """KL of the policy as it will be."""
    clients: tuple[str, ...] = ()
    """Who measured it."""

    @property
    def alphas(self) -> StepFractions:
        """[B]."""
        return tuple(block.alpha for block in self.blocks)


def full_step(blocks: Iterable[str]) -> AcceptedStep:
    """The whole step, and nobody is asked."""
    return AcceptedStep(
        tuple(AcceptedBlock(block, None, math.inf, 1.0, None) for block in blocks), None, math.inf, None
    )


def interpolate(old: Tensor, new: Tensor, blocks: Sequence[slice], alphas: StepFractions) -> Tensor:
    """Each block alpha of its way from old to new, [P] each: with 1 new's bits, with 0 old's. What is in none stays.

    Clients make what they measure with it, and the server what it accepts.
    """
    kept = old.clone()
    for block, alpha in zip(blocks, alphas, strict=True):
        if alpha == 1:
            kept[block] = new[block]
        elif alpha != 0:
            kept[block] = old[block].lerp(new[block], alpha)
    return kept
