"""Parts of a client's answers, from what its learner and its evaluation report."""

from __future__ import annotations

from grpo_fed.federation.messages import EvaluationSummary
from grpo_fed.rl.records import Evaluation, TrainingReport
from grpo_fed.runs.metrics import is_reported
from grpo_fed.scenario.scenario import Scenario


def reported_metrics(report: TrainingReport, seconds: float) -> dict[str, float]:
    """Select the metrics that a client reports to the server."""
    return {name: value for name, value in report.metrics(seconds).items() if is_reported(name)}


def needs_fisher(scenario: Scenario) -> bool:
    """Decide whether clients send the diagonals of their Fisher matrices."""
    return scenario.merge.rule == "fisher" or scenario.proximity.mode == "quadratic"


def summarise(evaluation: Evaluation, adapted: tuple[float, ...] = ()) -> EvaluationSummary:
    """Compute the statistics of an evaluation's episodes. adapted: mean returns after local updates."""
    scores = evaluation.scores
    return EvaluationSummary(
        mean=float(scores.mean()),
        std=float(scores.std()),
        least=float(scores.min()),
        most=float(scores.max()),
        episodes=len(scores),
        length=float(evaluation.lengths.mean()),
        adapted=adapted,
        cost=evaluation.cost,
    )
