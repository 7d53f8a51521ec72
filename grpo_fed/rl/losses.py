"""What an update reports: the losses of each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from grpo_fed.rl.objective import REPORTED_TERMS, LossTerms

Passes: TypeAlias = Sequence[tuple[Tensor | None, Sequence[LossTerms]]]
"""Terms of the minibatches of the last pass: first of all clients, with None, then of those that stopped before, with
their mask [K] bool."""


@dataclass(frozen=True)
class Losses:
    """Losses of an update."""

    values: Mapping[str, Tensor]
    """[K] each, by name: the `REPORTED_TERMS`, means over the minibatches of the last pass; `explained_variance`; and
    `kl`, KL(old, new) after the update, NaN if it was not measured."""
    constraints: Mapping[str, Tensor] = field(default_factory=dict)
    """[K] each, by the metrics' keys: what is constrained, and the constraints' multipliers in this update."""

    @classmethod
    def of(cls, passes: Passes, explained_variance: Tensor) -> Losses:
        """Average the terms. A client that stopped early has the losses that it stopped with."""

        def mean(term: str) -> Tensor:
            losses = torch.full_like(explained_variance, torch.nan)
            for clients, minibatches in passes:
                means = torch.stack([getattr(terms, term) for terms in minibatches]).mean(0)
                losses = means if clients is None else torch.where(clients, means, losses)
            return losses

        unknown = torch.full_like(explained_variance, torch.nan)
        terms = {term: mean(term) for term in REPORTED_TERMS}
        return cls({**terms, "explained_variance": explained_variance, "kl": unknown})

    def with_kl(self, kl: Tensor) -> Losses:
        """Set the KL [K] that was measured after the update."""
        return replace(self, values={**self.values, "kl": kl})

    def with_constraints(self, constraints: Mapping[str, Tensor]) -> Losses:
        """Add what is constrained, and multipliers, [K] each by the metrics' keys."""
        return replace(self, constraints={**self.constraints, **constraints})

    def client(self, row: int) -> dict[str, float]:
        """One client's losses by name."""
        return dict(zip(self.values, self._rows[row], strict=True))

    def client_constraints(self, row: int) -> dict[str, float]:
        """One client's constraints by the metrics' keys."""
        return {key: float(value[row]) for key, value in self.constraints.items()}

    @cached_property
    def _rows(self) -> list[list[float]]:
        """All losses of each client: one copy from a GPU instead of one for each number."""
        rows: list[list[float]] = torch.stack(list(self.values.values()), 1).tolist()
        return rows
