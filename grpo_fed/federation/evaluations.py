"""What clients scored when they were evaluated, and which of these scores the server believes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from grpo_fed.aggregation.outliers import medians_of_others
from grpo_fed.federation.messages import EvaluationSummary
from grpo_fed.runs.records import Failure

ABSURD = 1e9
"""How many times the others' median size a mean return may have."""


@dataclass(frozen=True)
class Evaluations:
    """Holds what clients scored when they were evaluated, by client."""

    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean returns."""
    adapted: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Mean returns after each of `evaluate.adapt` local updates."""

    @classmethod
    def of(cls, summaries: Mapping[str, EvaluationSummary], accepted: Iterable[str]) -> Self:
        """Take those of the clients whose returns are accepted."""
        taken = {name: summaries[name] for name in accepted}
        adapted = {name: summary.adapted for name, summary in taken.items() if summary.adapted}
        return cls({name: summary.mean for name, summary in taken.items()}, adapted)


def absurd_scores(scores: Mapping[str, float]) -> dict[str, Failure]:
    """Find the clients whose mean returns are of no scale that the others' have, with the reason."""
    sizes = {name: abs(score) for name, score in scores.items()}
    return {
        name: Failure("refused", f"a mean return of {scores[name]:.3g}, and the others' median size is {median:.3g}")
        for name, median in medians_of_others(sizes).items()
        if median < math.inf and sizes[name] > ABSURD * max(1.0, median)
    }
