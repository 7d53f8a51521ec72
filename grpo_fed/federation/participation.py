"""Chooses the clients that take part in a round."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import shorten

PAUSE = 0.1
"""Seconds between two checks of which clients can be reached."""
SOON, LATER = 1.0, 60.0
"""Seconds of waiting before the missing clients are logged, and before they are logged again."""

CURE = "start them with `grpo-fed deploy client`; `grpo-fed deploy status` shows who is connected"
"""What to do about clients that are missing."""

log = logging.getLogger(__name__)


def wait_for_clients(
    connected: Callable[[], tuple[str, ...]], clients: Iterable[str], count: int, deadline: float | None
) -> tuple[str, ...]:
    """Wait until `count` clients are connected or `deadline` seconds have passed; return those that are connected.

    connected: finds the clients that can be reached now. Clients that are missing are logged at once and every minute.
    """
    began = time.monotonic()
    next_line = began + SOON
    until = math.inf if deadline is None else began + deadline
    while len(names := connected()) < count and (now := time.monotonic()) < until:
        if now > next_line:
            next_line += LATER
            missing = ", ".join(sorted(set(clients) - set(names)))
            log.warning("waiting for %s; %s", shorten(missing), CURE)
        time.sleep(PAUSE)
    return names


def sample_clients(scenario: Scenario, connected: tuple[str, ...], round: int) -> list[str]:
    """Choose the clients that take part in a round, in the order of their names.

    connected: all clients that can be reached now; those with `trains = false` take no part. With `round.fraction`
    below 1 a part of the others is sampled from the round's own random stream, so the choice depends on the seed and
    the round's number alone.
    """
    trained = {name for settings in scenario.clients if settings.trains for name in settings.names}
    ordered = sorted(trained.intersection(connected))
    if scenario.round.fraction == 1 or not ordered:
        return ordered
    stream = generator(scenario.seed, Purpose.PARTICIPATION, round)
    chosen = stream.choice(len(ordered), ceil_fraction(scenario.round.fraction, len(ordered)), replace=False)
    return [ordered[index] for index in sorted(chosen.tolist())]


def held_out_clients(scenario: Scenario) -> tuple[str, ...]:
    """List the clients that take no part in training, in the scenario's order."""
    return tuple(name for settings in scenario.clients if not settings.trains for name in settings.names)


def ceil_fraction(fraction: float, count: int) -> int:
    """Compute a fraction of a count, rounded up (but not for a rounding error), at least 1."""
    return max(1, math.ceil(fraction * count - 1e-9))
