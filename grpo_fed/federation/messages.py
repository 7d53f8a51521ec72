"""The instructions that the server sends to clients in a round, and their answers.

S parameters of the shared blocks, G parameter groups of them, B blocks. Arrays are numpy's, since everything here
is sent. The transport names the client of a message; the message itself does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np


@dataclass(frozen=True, eq=False)
class Start:
    """Tells a client what to start from before it carries out an instruction."""

    run: str
    """The federation's unique name: a client stores a state for each federation that it is in."""
    round: int
    """The round's number, from 1."""
    shared: np.ndarray
    """[S] float32: this client's shared blocks."""
    departed: tuple[int, ...] = ()
    """The parameter groups that it has left, 0 to G - 1 in order: there it goes on with its own parameters."""


@dataclass(frozen=True, eq=False)
class EvaluationPlan:
    """Selects the episodes of an evaluation."""

    number: int
    """Selects the episodes' seeds: the round that has just ended, 0 before the first."""
    deterministic: bool = True


@dataclass(frozen=True)
class MaskPlan:
    """Tells a client how to mask what it has learned, with secure aggregation."""

    session: str
    """The name of the session in which the clients have agreed on keys, in hexadecimal."""
    peers: tuple[str, ...]
    """The neighbours whose masks it adds."""
    clients: int
    """How many clients the sum may have: the more, the coarser its numbers."""
    bounds: tuple[float, ...] = ()
    """[G]: with a privacy budget, the lengths that groups of its difference are cut to; else empty."""


@dataclass(frozen=True, eq=False)
class SecureStep:
    """Instruction to take a step of secure aggregation beside learning; `start.shared` is empty.

    Parts are bytes in base64, one for each name.
    """

    start: Start
    step: SecureStepName
    session: str
    names: tuple[str, ...] = ()
    """With `shares`, the client's neighbours; with `reveal`, those that sent it a share."""
    parts: tuple[str, ...] = ()
    """With `shares`, their public keys; with `reveal`, the shares, encrypted for the client."""
    answered: tuple[str, ...] = ()
    """With `reveal`, those whose masked numbers the server has."""


SecureStepName: TypeAlias = Literal["keys", "shares", "reveal"]


@dataclass(frozen=True, eq=False)
class Train:
    """Instruction to learn, beginning with the shared blocks."""

    start: Start
    begin: float
    """Progress of the run, 0 to 1, at the beginning of the round."""
    end: float
    """Progress of the run at the end of the round."""
    measure_last_step: bool = False
    """Whether to measure the KL of the last round's step: from the shared blocks that it began with to these."""
    evaluate_first: EvaluationPlan | None = None
    """The evaluation of the last round's shared blocks, before learning; None for no evaluation."""
    compare: tuple[int, ...] = ()
    """Parameter groups in which the client plays with its own parameters and with the shared ones before it learns, and
    then begins with the shared ones if they are no worse; 0 to G - 1 in order."""
    curriculum: tuple[float, ...] = ()
    """The state of the curriculum that the server steers; empty for a client that has none, or moves its own."""
    rate: float = 1.0
    """What the client multiplies its learning rate by in this round."""
    mask: MaskPlan | None = None
    """With secure aggregation, how it masks what it has learned."""


@dataclass(frozen=True, eq=False)
class Measure:
    """Instruction to measure the KL of steps from this round's shared blocks, on states that the client keeps."""

    start: Start
    """`shared` as the round began; `departed` as the merge has it now."""
    candidate: np.ndarray
    """[S] float32: the merge's target."""
    fractions: tuple[tuple[float, ...], ...]
    """[M, B]: the fraction of the way to the target that each block goes, for M steps."""


@dataclass(frozen=True, eq=False)
class Evaluate:
    """Instruction to evaluate the policy; `start.round` is the last round that the client trained in, 0 for none."""

    start: Start
    plan: EvaluationPlan


Instruction: TypeAlias = Train | Measure | Evaluate | SecureStep


@dataclass(frozen=True, eq=False)
class EvaluationSummary:
    """Statistics of the episodes of an evaluation."""

    mean: float
    """Mean return."""
    std: float
    """Standard deviation of the returns."""
    least: float
    """Lowest return."""
    most: float
    """Highest return."""
    episodes: int
    length: float
    """Mean length in steps."""
    adapted: tuple[float, ...] = ()
    """Mean return after each of `evaluate.adapt` local updates; empty where none are made."""
    cost: float | None = None
    """Mean cost of the episodes; None where costs have no limit."""


@dataclass(frozen=True, eq=False)
class SharingComparison:
    """A client's own parameters and the shared ones, compared by playing the same episodes."""

    own: float
    """Mean return with its own parameters."""
    shared: float
    """Mean return with the shared ones."""
    error: float
    """Standard error of the difference of the two."""
    learned: float
    """Mean return with its own parameters less the lowest mean return of a round."""
    episodes: int
    """Episodes that were played, with both together."""
    shares: bool
    """Whether the client began the round with the shared parameters."""
    is_open: bool = False
    """Whether neither the one nor the other turned out to be better or no worse, so that all stays as it was."""


@dataclass(frozen=True, eq=False)
class Trained:
    """Answer to `Train`."""

    point: np.ndarray
    """[S] float32: the shared blocks after training."""
    steps: int
    """Environment steps that it learned from."""
    episodes: int
    """Training episodes that finished."""
    gain: float
    """Mean training return of this round minus that of the round before; 0 if one of them is unknown."""
    spread: float
    """Standard deviation of this round's training returns; 0 if unknown."""
    metrics: Mapping[str, float]
    """Under keys that `runs.metrics.is_reported` allows; finite."""
    fisher: np.ndarray | None = None
    """[S] float32, 0 or more: the diagonal of the policy's Fisher matrix, if the scenario needs it."""
    kl: tuple[float, ...] | None = None
    """[1 + B]: KL of the last round's step, with all blocks moved and with each alone; None if it was not asked for, or
    the client has no states of that round."""
    evaluation: EvaluationSummary | None = None
    """The evaluation that `evaluate_first` asked for."""
    low: bool = False
    """Whether the mean return says that most of what had been learned is lost, as it is where a task changes."""
    since: int | None = None
    """The round of the state that it went on from, 0 if it began anew; None if that was the round before."""
    comparison: SharingComparison | None = None
    """The comparison that `compare` asked for; None too where the client has no parameters of its own yet."""
    difference: np.ndarray | None = None
    """[S] float16: what is sent in place of the point, with `wire.dtype = "float16"`; of the shared blocks that the
    client began with, the point is this difference away."""
    evidence: tuple[float, ...] = ()
    """[2 * S]: with a curriculum that the server steers, the episodes of each of its S slots, and then the sum of their
    returns, or the successes among them (tasks/curriculum.py)."""
    masked: np.ndarray | None = None
    """[N] uint32: with secure aggregation, what is sent in place of the point, which is empty then."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Answer to `Measure`: KL averaged over the client's states."""

    kl: tuple[float, ...]
    """[M]: one for each step."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Answer to `Evaluate`."""

    summary: EvaluationSummary


@dataclass(frozen=True, eq=False)
class SecureParts:
    """Answer to `SecureStep`: bytes in base64, one for each name."""

    names: tuple[str, ...]
    """With `keys`, none; with `shares`, the neighbours; with `reveal`, the clients that the shares belong to."""
    parts: tuple[str, ...]
    own: str = ""
    """With `keys`, the public keys; with `shares`, the hash of the client's secret."""


Answer: TypeAlias = Trained | Measured | Evaluated | SecureParts
