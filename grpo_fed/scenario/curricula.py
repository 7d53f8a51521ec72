"""The table of curricula: how the levels of a client's task are chosen, by `kind` in its `curriculum`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CurriculumKind:
    """A way to choose the levels of training; `grpo_fed/tasks/curriculum.py` has the functions."""

    name: str
    """The full name, in words."""
    paper: str
    """The source."""
    keys: tuple[str, ...]
    """The keys of the client's `curriculum` that it reads, beside `ranges`."""
    when: str
    """When to use it."""
    by_returns: bool
    """Whether returns move it, so that a server can steer it."""


CURRICULA: Mapping[str, CurriculumKind] = {
    "uniform": CurriculumKind(
        "uniform levels",
        "Tobin et al. 2017, 1703.06907: domain randomisation.",
        (),
        "The control: does an order of the levels help at all? And for clients that are evaluated alone.",
        by_returns=False,
    ),
    "schedule": CurriculumKind(
        "a box that grows by progress",
        "After Bengio et al. 2009, with the whole box at once.",
        ("start", "until"),
        "Where you know how fast the clients learn. Nothing is measured, so nothing can mislead it.",
        by_returns=False,
    ),
    "return": CurriculumKind(
        "a box that grows by the mean return",
        "After Bengio et al. 2009, with the mean return of the box as the test.",
        ("start", "target", "floor", "step", "episodes"),
        "Where returns are of the same scale at all levels, and no argument is harder in one direction alone.",
        by_returns=True,
    ),
    "expanding": CurriculumKind(
        "a box whose edges move by themselves",
        "Akkaya et al. 2019, 1910.07113: automatic domain randomisation.",
        ("start", "target", "floor", "step", "episodes", "edges"),
        "Where some directions are harder than others: an edge that is not mastered stays, and the others go on.",
        by_returns=True,
    ),
    "learnability": CurriculumKind(
        "levels that are solved sometimes",
        "Rutherford et al. 2024, 2408.15099; here drawn in proportion to p (1 - p), by faded counts of training.",
        ("target", "levels", "explore", "fade"),
        "Where you know no easy levels to begin with, and success is a return.",
        by_returns=True,
    ),
    "replay": CurriculumKind(
        "levels by seeds, replayed where the critic errs",
        "Jiang et al. 2021, 2010.03934: prioritised level replay, by rank of the mean |advantage|.",
        ("levels", "explore", "temperature", "staleness"),
        "Where a seed decides more than any argument does, as in environments that are generated. Needs a critic.",
        by_returns=False,
    ),
}
