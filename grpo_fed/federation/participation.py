"""Who takes part in a round."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import shorten

PAUSE = 0.1
"""Seconds between two looks at who can be reached."""
LONG = 10.0
"""Seconds of waiting before something is said of it."""

log = logging.getLogger(__name__)


def wait_for_clients(
    look: Callable[[], tuple[str, ...]], everybody: Iterable[str], wanted: int, deadline: float | None
) -> tuple[str, ...]:
    """Who is there by `look` as soon as so many are, or the deadline is over. Who is long waited for is named."""
    began, told = time.monotonic(), False
    until = math.inf if deadline is None else began + deadline
    while len(names := look()) < wanted and (now := time.monotonic()) < until:
        if now > began + LONG and not told:
            told = True
            missing = ", ".join(sorted(set(everybody) - set(names)))
            log.warning("waiting for %s", shorten(missing))
        time.sleep(PAUSE)
    return names


def sample_clients(scenario: Scenario, names: tuple[str, ...], number: int) -> list[str]:
    """Clients for a round, by name: all of these, or as many as `round.fraction` says by the round's own stream."""
    ordered = sorted(names)
    if scenario.round.fraction == 1 or not ordered:
        return ordered
    stream = generator(scenario.seed, Purpose.PARTICIPATION, number)
    chosen = stream.choice(len(ordered), ceil_fraction(scenario.round.fraction, len(ordered)), replace=False)
    return [ordered[place] for place in sorted(chosen.tolist())]


def ceil_fraction(fraction: float, count: int) -> int:
    """So many of a count, one at least; rounded up, but not for a rounding error."""
    return max(1, math.ceil(fraction * count - 1e-9))
