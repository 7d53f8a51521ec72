"""What clients scored when they were evaluated, and which of these scores the server believes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from grpo_fed.aggregation.outliers import medians_of_others
from grpo_fed.federation.messages import EvaluationSummary
from grpo_fed.runs.evaluations import Evaluations
from grpo_fed.runs.records import Failure

ABSURD = 1e9
"""How many times the others' median size a mean return may have."""


def accept_evaluations(summaries: Mapping[str, EvaluationSummary], accepted: Iterable[str]) -> Evaluations:
    """Take the evaluations of the clients whose returns are accepted."""
    taken = {name: summaries[name] for name in accepted}
    return Evaluations(
        {name: summary.mean for name, summary in taken.items()},
        {name: summary.adapted for name, summary in taken.items() if summary.adapted},
        {name: summary.cost for name, summary in taken.items() if summary.cost is not None},
    )


def absurd_scores(scores: Mapping[str, float]) -> dict[str, Failure]:
    """Find the clients whose mean returns are of no scale that the others' have, with the reason."""
    sizes = {name: abs(score) for name, score in scores.items()}
    return {
        name: Failure("refused", f"a mean return of {scores[name]:.3g}, and the others' median size is {median:.3g}")
        for name, median in medians_of_others(sizes).items()
        if median < math.inf and sizes[name] > ABSURD * max(1.0, median)
    }
