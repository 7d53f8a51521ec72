"""Explains in words what secure aggregation hides, how exact its sums are, whom it can lose, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from grpo_fed.aggregation.secure.fixed_point import resolution
from grpo_fed.aggregation.secure.participant import REVEALED_BYTES, SHARES_BYTES, threshold_of
from grpo_fed.aggregation.secure.primitives import KEY_BYTES
from grpo_fed.aggregation.secure.recovery import MOST_NEIGHBOURS
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.formatting import format_count
from grpo_fed.scenario.scenario import Scenario

FIXED_BYTES = 1000
"""About how many bytes the names of a run and a session and of fields take in a round's messages to a client."""


def explain_secure(scenario: Scenario, shared: SharedBlocks) -> Iterator[str]:
    """Explain secure aggregation; nothing without it."""
    if not scenario.privacy.secure or not shared.size:
        return
    trained = shared.training_clients
    clients, reach = max(1, math.ceil(scenario.round.fraction * len(trained) - 1e-9)), scenario.privacy.reach
    yield (
        f"Clients mask what they send, so that the server learns the sum of all differences alone, with"
        f" {format_count(clients, 'client')} in steps of {resolution(reach, clients):.2g}; what a parameter changes by"
        f" beyond {reach:g} is cut."
    )
    if clients <= 2:
        yield "That takes three clients in a round: with fewer nothing is merged."
        return
    neighbours = min(clients - 1, MOST_NEIGHBOURS)
    size = secure_bytes(neighbours, fmean(map(len, trained)))
    yield (
        f"The sum of a round is known if at least {threshold_of(neighbours)} of the {neighbours} neighbours of each"
        f" client answer, and otherwise nothing is merged. Each client gets three more messages in a round, with some"
        f" {size:,} bytes both ways beside the {4 * shared.size:,} of what it has learned."
    )
    if scenario.privacy.metrics == "all":
        yield "Returns and other metrics that clients report are not masked: docs/privacy.md."


def secure_bytes(neighbours: int, name: float) -> int:
    """Estimate the bytes of keys and shares to a client and from it in a round.

    name: the mean length of a client's name.
    """
    keys, shares, revealed = (4 * math.ceil(size / 3) for size in (2 * KEY_BYTES, SHARES_BYTES, REVEALED_BYTES))
    names = 7 * name  # of neighbours: with keys, with shares both ways, with what is revealed, masked with, answered
    return round(FIXED_BYTES + neighbours * (keys + 2 * shares + revealed + names))
