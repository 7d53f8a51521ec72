"""The records of a step of B shared blocks: its budgets, and what was accepted. Reading them needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

StepFractions: TypeAlias = tuple[float, ...]
"""[B]: alpha of each block, the fraction of its step."""


@dataclass(frozen=True)
class Budgets:
    """The KL from the current shared policy that a step may have; 0 moves nothing, infinity is no limit."""

    blocks: Mapping[str, float]
    """The budget of each shared block, moved alone."""
    joint: float = math.inf
    """The budget of all shared blocks, moved together."""
    over: Literal["mean", "median", "worst"] = "mean"
    """What has to be within a budget: the weighted mean of the clients' KL, their weighted median, or the greatest."""


@dataclass(frozen=True)
class AcceptedBlock:
    """The step of one block. A KL is None where it was not measured."""

    block: str
    wanted: float | None
    """The KL of the policy with this block alone moved by its whole step."""
    budget: float
    """The block's KL budget."""
    alpha: float
    """The fraction of the block's step that is made."""
    kl: float | None
    """The KL of the policy with this block alone moved by that fraction."""


@dataclass(frozen=True)
class AcceptedStep:
    """The step that the server makes, and its KL. A KL is None where it was not measured."""

    blocks: tuple[AcceptedBlock, ...]
    """[B]: the step of each block."""
    joint_wanted: float | None
    """The KL of the policy with all blocks moved by their whole steps."""
    joint_budget: float
    """The KL budget of all blocks together."""
    joint: float | None
    """The KL of the policy after the step."""
    clients: tuple[str, ...] = ()
    """Names of the clients that measured it."""

    @property
    def alphas(self) -> StepFractions:
        """[B]: the fraction of each block's step."""
        return tuple(block.alpha for block in self.blocks)


def full_step(blocks: Iterable[str]) -> AcceptedStep:
    """Return the whole step, without a measurement."""
    return AcceptedStep(
        tuple(AcceptedBlock(block, None, math.inf, 1.0, None) for block in blocks), None, math.inf, None
    )
