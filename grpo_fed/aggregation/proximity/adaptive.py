"""Adapts KL budgets to what the steps did to the clients' returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from grpo_fed.aggregation.proximity.records import AcceptedStep

WIDEN, TIGHTEN, RANGE = 1.5, 0.5, 10.0
MAX_GAIN = 1e6
"""The greatest gain or loss that a client may report, in units of its spread; so squares of gains stay finite."""


def adapt_budgets(
    budgets: Mapping[str, float], start: Mapping[str, float], step: AcceptedStep, gains: Sequence[float]
) -> dict[str, float]:
    """Return the blocks' budgets for the next round.

    Where the clients gained in the mean, the budget of a block that was shortened widens by half; where they lost, a
    budget of which half or more was used is halved; a mean within its standard error of 0 counts as chance. A trust
    region follows the gain of its step in this way (Nocedal & Wright, Numerical Optimization, algorithm 4.1).

    budgets: of this round. start: of the first round; budgets stay within a factor of 10 of these. step: the last one.
    gains: of each client, its return after the step less that before, in units of the spread of its returns.
    """
    adapted = dict(budgets)
    if len(gains) < 2:
        return adapted
    gains = [min(max(gain, -MAX_GAIN), MAX_GAIN) for gain in gains]
    mean = math.fsum(gains) / len(gains)
    error = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
    for block in step.blocks:
        budget = budgets[block.block]
        if mean > error and block.alpha < 1:
            budget *= WIDEN
        elif mean < -error and block.kl is not None and block.kl >= budget / 2:
            budget *= TIGHTEN
        least, most = start[block.block] / RANGE, start[block.block] * RANGE
        adapted[block.block] = min(max(budget, least), most)
    return adapted
