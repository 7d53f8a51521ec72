"""Evaluations: what clients scored when they were evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from grpo_fed.runs.records import RoundRecord


@dataclass(frozen=True)
class Evaluations:
    """Holds what clients scored when they were evaluated, by client."""

    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean returns."""
    adapted: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Mean returns after each of `evaluate.adapt` local updates."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """Mean costs, where they have a limit."""


def with_evaluations(record: RoundRecord, evaluations: Evaluations) -> RoundRecord:
    """Give the clients of a record what they scored in the evaluation after the round."""
    scores, adapted, costs = evaluations.scores, evaluations.adapted, evaluations.costs
    clients = [
        replace(
            client,
            score=scores.get(client.client),
            adapted=adapted.get(client.client, ()),
            cost=costs.get(client.client),
        )
        for client in record.clients
    ]
    return replace(record, clients=clients)
