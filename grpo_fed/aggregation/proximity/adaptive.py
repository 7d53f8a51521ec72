"""Budgets that follow what the steps did to the clients' performance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from grpo_fed.aggregation.proximity.records import AcceptedStep

WIDEN, TIGHTEN, RANGE = 1.5, 0.5, 10.0
MOST = 1e6
"""Of its own spread that a client is believed to have gained or lost; squares of what it says must be numbers."""


def adapt_budgets(
    budgets: Mapping[str, float], start: Mapping[str, float], kept: AcceptedStep, gains: Sequence[float]
) -> dict[str, float]:
    """The blocks' budgets for the next round.

    gains: of each client, its performance after the step less that before, in units of its own spread.

    Where clients gained, the budget of a block that was held back widens by half; where they lost, one of which half or
    more was used is halved; and what is within a standard error of no gain is chance. As a trust region follows the
    gain of its step (Nocedal & Wright, Numerical Optimization, algorithm 4.1), within a factor of 10 of `start`.
    """
    adapted = dict(budgets)
    if len(gains) < 2:
        return adapted
    gains = [min(max(gain, -MOST), MOST) for gain in gains]
    mean = math.fsum(gains) / len(gains)
    error = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
    for block in kept.blocks:
        budget = budgets[block.block]
        if mean > error and block.alpha < 1:
            budget *= WIDEN
        elif mean < -error and block.kl is not None and block.kl >= budget / 2:
            budget *= TIGHTEN
        least, most = start[block.block] / RANGE, start[block.block] * RANGE
        adapted[block.block] = min(max(budget, least), most)
    return adapted
