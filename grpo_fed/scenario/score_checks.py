"""Finds contradictions of the returns that normalise a client's score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from grpo_fed.scenario.language_checks import Contradiction

if TYPE_CHECKING:
    from grpo_fed.scenario.scenario import Scenario


def score_contradictions(scenario: Scenario) -> Iterator[Contradiction]:
    """Find references that are not above the return of random actions."""
    for number, client in enumerate(scenario.clients):
        if client.score is not None and client.score.reference <= client.score.random:
            text = f"must be above random = {client.score.random:g}, which a normalised score of 0 stands for"
            yield text, (("clients", number, "score", "reference"), ("clients", number, "score", "random"))
