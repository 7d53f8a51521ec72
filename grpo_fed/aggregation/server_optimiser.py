"""Server optimisers: the difference that a merge asks for is a gradient, and the server steps along it (2003.00295).

With Delta = s* - s, the merge's target less the shared blocks, the target becomes s + step(Delta): Delta times a rate
(FedAvg with a server learning rate; at a rate below 1 the outer step of Reptile, 1803.02999), with momentum (FedAvgM,
1909.06335), or Adam's step (FedAdam). What is then made of the step within the KL budgets is another matter.

S shared parameters. A group that no client shares in a merge is left alone, and one that a client leaves begins anew,
so that clients which have departed from a group do not move it, not even by what they did before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from grpo_fed.scenario.settings import MergeSettings

SQUARE_DECAY = 0.99
"""Beta 2 of the server's Adam, as in the paper."""


@final
@dataclass(frozen=True, eq=False)
class OptimiserState:
    """Holds what a server optimiser remembers of the merges before, [S] each."""

    mean: Tensor
    """The momentum: with `momentum` a decaying sum of differences, with `adam` a decaying mean."""
    square: Tensor
    """With `adam`, a decaying mean of their squares; else 0."""

    @classmethod
    def first(cls, settings: MergeSettings, size: int) -> Self | None:
        """Make the state before the first merge; None for an optimiser without a state."""
        if settings.optimiser == "sgd" or not size:
            return None
        return cls(torch.zeros(size), torch.full((size,), _first_square(settings)))

    def arrays(self) -> Mapping[str, Tensor]:
        """Name the tensors, to be saved."""
        return {"mean": self.mean, "square": self.square}


def step_towards(
    settings: MergeSettings,
    state: OptimiserState | None,
    shared: Tensor,
    target: Tensor,
    moving: Tensor,
    begins_anew: Tensor,
) -> tuple[Tensor, OptimiserState | None]:
    """Find the point [S] that the server's optimiser wants the shared blocks to move to, and its next state.

    shared, target: [S], the shared blocks and what the merge made of them. moving: [S] bool, the parameters of groups
    that some client shares in this merge; the others stay. begins_anew: [S] bool, those of groups that a client has
    left in it.
    """
    difference = target - shared
    if state is None:
        point = target if settings.rate == 1 else shared + settings.rate * difference
        return torch.where(moving, point, shared), None
    mean = state.mean.masked_fill(begins_anew, 0.0)
    square = state.square.masked_fill(begins_anew, _first_square(settings))
    if settings.optimiser == "momentum":
        new_mean, new_square = settings.momentum * mean + difference, square
        step = settings.rate * new_mean
    else:
        new_mean = settings.momentum * mean + (1 - settings.momentum) * difference
        new_square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * difference.square()
        step = settings.rate * new_mean / (new_square.sqrt() + settings.epsilon)
    next_state = OptimiserState(torch.where(moving, new_mean, mean), torch.where(moving, new_square, square))
    return torch.where(moving, shared + step, shared), next_state


def _first_square(settings: MergeSettings) -> float:
    """The second moment before the first merge: epsilon squared, the least that the paper allows."""
    return settings.epsilon**2 if settings.optimiser == "adam" else 0.0
