"""What server and clients say to each other in a round.

S parameters of the shared blocks, G groups of them, B blocks. Arrays are numpy's, for all that is here goes through the
wire. A client is named by whoever carries a message, never by the message itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True, eq=False)
class Start:
    """Where a client stands before it does what it is told."""

    run: str
    """Names the federation; what a client remembers of another run is not this one's."""
    round: int
    """From 1."""
    shared: np.ndarray
    """[S] float32: the shared blocks for this client."""
    departed: tuple[int, ...] = ()
    """The groups, 0 to G - 1 in order, that it has left: there it keeps what it has."""


@dataclass(frozen=True, eq=False)
class EvaluationPlan:
    """Episodes without learning."""

    number: int
    """Which episodes: the round that has just ended, 0 before the first."""
    deterministic: bool = True


@dataclass(frozen=True, eq=False)
class Train:
    """Learn from the shared blocks on."""

    start: Start
    begin: float
    """Progress of the run, 0 to 1, at the beginning of the round."""
    end: float
    """And at its end."""
    measure_last_step: bool = False
    """Measure the KL of the step from the shared blocks that the last round began with to these."""
    evaluate_first: EvaluationPlan | None = None
    """Play before learning: with what the last round made."""


@dataclass(frozen=True, eq=False)
class Measure:
    """The KL of candidate steps from this round's shared blocks, on states that stay with the client."""

    start: Start
    """`shared` as the round began; `personal` as the merge has it now."""
    candidate: np.ndarray
    """[S] float32: where the merge wants to go."""
    fractions: tuple[tuple[float, ...], ...]
    """[M, B]: how much of its way each block goes."""


@dataclass(frozen=True, eq=False)
class Evaluate:
    """Play without learning, with what the round made: `start.round` is the last round that was trained, 0 for none."""

    start: Start
    play: EvaluationPlan


Instruction: TypeAlias = Train | Measure | Evaluate


@dataclass(frozen=True, eq=False)
class EvaluationSummary:
    """Of episodes without learning."""

    mean: float
    """Return."""
    std: float
    least: float
    most: float
    episodes: int
    length: float
    """Mean steps."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a client made of a round."""

    point: np.ndarray
    """[S] float32: the shared blocks as it leaves them."""
    steps: int
    """Environment steps that it learned from."""
    episodes: int
    """Those that finished."""
    gain: float
    """Mean training return of this round less that of the round before; 0 where one of them has none."""
    spread: float
    """Standard deviation of this round's returns; 0 if unknown."""
    metrics: Mapping[str, float]
    """Under the keys of `runs.metrics.REPORTED`; finite."""
    fisher: np.ndarray | None = None
    """[S] float32, 0 or more: the diagonal of its policy's Fisher matrix, where the scenario needs it."""
    kl: tuple[float, ...] | None = None
    """[1 + B]: of the last round's step, all blocks together and each alone; None where it was not asked for, or the
    client does not have the states."""
    played: EvaluationSummary | None = None
    """Where `first` asked for it."""


@dataclass(frozen=True, eq=False)
class Measured:
    """KL, averaged over the client's states."""

    kl: tuple[float, ...]
    """[M]."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """An answer to `Evaluate`."""

    played: EvaluationSummary


Answer: TypeAlias = Trained | Measured | Evaluated
