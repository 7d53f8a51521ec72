"""Weights of clients in a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

Weighting: TypeAlias = Literal["uniform", "steps", "episodes", "progress"]


@dataclass(frozen=True)
class ClientWork:
    """What a client reports of its own work in a round."""

    steps: int
    """Environment steps that the client learned from."""
    episodes: int
    """Episodes that ended."""
    gain: float
    """The client's mean return, less its mean return in the round before."""
    spread: float
    """The standard deviation of the client's returns: the unit in which tasks with different rewards compare."""


def client_weight(work: ClientWork, weighting: Weighting) -> float:
    """Compute a client's weight in a mean: 0 or more, and relative to other clients' weights.

    - `uniform`: 1.
    - `steps`, `episodes`: their number.
    - `progress`: the logistic function of the gain in units of the spread: 1/2 for a client that is as good as before,
      towards 0 for one that got worse. It is at most 1, so a client with false reports counts for two at most.
    """
    match weighting:
        case "uniform":
            return 1.0
        case "steps":
            return float(work.steps)
        case "episodes":
            return float(work.episodes)
        case "progress":
            if work.spread > 0:
                return 0.5 + 0.5 * math.tanh(0.5 * work.gain / work.spread)
            return 0.5 + 0.5 * math.copysign(1.0, work.gain) * (work.gain != 0)
        case _:
            assert_never(weighting)
