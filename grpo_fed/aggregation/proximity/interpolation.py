"""Moves shared blocks by fractions of a step. P parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fed.aggregation.proximity.records import StepFractions


def interpolate(old: Tensor, new: Tensor, blocks: Sequence[slice], alphas: StepFractions) -> Tensor:
    """Move each block by a fraction of the step from old to new, [P] each; parameters in no block stay.

    A fraction of 1 gives the bits of `new`, and 0 those of `old`. Clients compute the steps that they measure with this
    function, and the server the step that it accepts, so both are the same to the bit.
    """
    moved = old.clone()
    for block, alpha in zip(blocks, alphas, strict=True):
        if alpha == 1:
            moved[block] = new[block]
        elif alpha != 0:
            moved[block] = torch.lerp(old[block], new[block], alpha)
    return moved
