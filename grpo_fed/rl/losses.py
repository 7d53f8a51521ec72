"""What an update reports: the losses of each client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from grpo_fed.rl.objective import LossTerms

Passes: TypeAlias = Sequence[tuple[Tensor | None, Sequence[LossTerms]]]
"""Terms of the minibatches of the last pass: first of all clients, with None, then of those that stopped before, with
their mask [K] bool."""


@dataclass(frozen=True)
class Losses:
    """Losses of an update, [K] each: means over the minibatches of the last pass."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clipfrac: Tensor
    explained_variance: Tensor
    kl: Tensor
    """KL(old, new) after the update; NaN where it was not measured."""

    @classmethod
    def of(cls, passes: Passes, explained_variance: Tensor) -> Losses:
        """Average the terms. A client that stopped early has the losses that it stopped with."""

        def mean(term: Callable[[LossTerms], Tensor]) -> Tensor:
            losses = torch.full_like(explained_variance, torch.nan)
            for clients, minibatches in passes:
                means = torch.stack([term(terms) for terms in minibatches]).mean(0)
                losses = means if clients is None else torch.where(clients, means, losses)
            return losses

        return cls(
            mean(lambda terms: terms.policy_loss),
            mean(lambda terms: terms.value_loss),
            mean(lambda terms: terms.entropy),
            mean(lambda terms: terms.approx_kl),
            mean(lambda terms: terms.clip_fraction),
            explained_variance,
            torch.full_like(explained_variance, torch.nan),
        )

    def client(self, row: int) -> dict[str, float]:
        """One client's losses by name."""
        return dict(zip((field.name for field in fields(self)), self._rows[row], strict=True))

    @cached_property
    def _rows(self) -> list[list[float]]:
        """All fields of each client: one copy from a GPU instead of one for each number."""
        rows: list[list[float]] = torch.stack([getattr(self, field.name) for field in fields(self)], 1).tolist()
        return rows
