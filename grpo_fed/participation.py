"""Who takes part in a round."""

from __future__ import annotations

import math
import time

from grpo_fed.post import Post
from grpo_fed.scenario import Scenario
from grpo_fed.streams import Purpose, generator

PAUSE = 0.1
"""Seconds between two looks at who can be reached."""


def reach(post: Post, wanted: int, deadline: float | None) -> tuple[str, ...]:
    """Who can be reached as soon as that many can, or when the deadline is over."""
    until = math.inf if deadline is None else time.monotonic() + deadline
    while len(names := post.reachable()) < wanted and time.monotonic() < until:
        time.sleep(PAUSE)
    return names


def draw(scenario: Scenario, names: tuple[str, ...], number: int) -> list[str]:
    """Clients for a round, by name: all of these, or as many as `round.fraction` says by the round's own stream."""
    ordered = sorted(names)
    if scenario.round.fraction == 1 or not ordered:
        return ordered
    stream = generator(scenario.seed, Purpose.PARTICIPATION, number)
    chosen = stream.choice(len(ordered), part_of(scenario.round.fraction, len(ordered)), replace=False)
    return [ordered[place] for place in sorted(chosen.tolist())]


def part_of(fraction: float, count: int) -> int:
    """So many of a count, one at least; rounded up, but not for a rounding error."""
    return max(1, math.ceil(fraction * count - 1e-9))
