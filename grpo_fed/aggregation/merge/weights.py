"""How much each client counts in a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

Weighting: TypeAlias = Literal["uniform", "steps", "episodes", "progress"]


@dataclass(frozen=True)
class ClientWork:
    """What a client tells of its own work in a round."""

    steps: int
    """Of its environment, that it learned from."""
    episodes: int
    """That ended."""
    gain: float
    """Its mean return now less what it was before."""
    spread: float
    """Standard deviation of its returns; the unit in which tasks with unlike rewards compare."""


def weight(effort: ClientWork, by: Weighting) -> float:
    """Of one client, of any scale, 0 or more.

    - `uniform`: all alike.
    - `steps`, `episodes`: by experience.
    - `progress`: the logistic function of the gain in units of the spread: 1/2 for a client where it was, towards 0 for
      one that got worse. Never above 1: whatever a client says, it counts no more than two that stand still.
    """
    match by:
        case "uniform":
            return 1.0
        case "steps":
            return float(effort.steps)
        case "episodes":
            return float(effort.episodes)
        case "progress":
            if effort.spread > 0:
                return 0.5 + 0.5 * math.tanh(0.5 * effort.gain / effort.spread)
            return 0.5 + 0.5 * math.copysign(1.0, effort.gain) * (effort.gain != 0)
        case _:
            assert_never(by)
