"""What a client reports of itself, and what is left of it with `privacy.metrics = "withheld"`: nothing.

Returns, lengths, losses and whatever follows from them stay with the client. What remains is what merges need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from grpo_fed.federation.messages import Answer, Evaluated, EvaluationSummary, Trained
from grpo_fed.scenario.scenario import Scenario

NOT_PLAYED = EvaluationSummary(0.0, 0.0, 0.0, 0.0, 0, 0.0)
"""The evaluation of a client that does not say what it scored: of no episodes."""
WITHHELD = Evaluated(NOT_PLAYED)


def are_withheld(scenario: Scenario) -> bool:
    """Return whether clients keep what they report of themselves."""
    return scenario.privacy.metrics == "withheld"


def withhold_metrics(scenario: Scenario, answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Remove from answers what clients report of themselves, if the scenario says so."""
    return {name: _without(scenario, each) for name, each in answers.items()} if are_withheld(scenario) else {**answers}


def _without(scenario: Scenario, answer: Answer) -> Answer:
    """Remove what an answer says of returns, and of steps where episodes are as long as their return is high."""
    match answer:
        case Trained():
            steps = scenario.steps if scenario.objective.advantage == "group" else answer.steps
            return replace(
                answer,
                steps=steps,
                episodes=0,
                gain=0.0,
                spread=0.0,
                low=False,
                metrics={},
                evaluation=None,
                evidence=(),
            )
        case Evaluated():
            return WITHHELD
        case _:
            return answer


def played(summaries: Mapping[str, EvaluationSummary]) -> dict[str, EvaluationSummary]:
    """Leave out the evaluations of clients that do not say what they scored."""
    return {name: summary for name, summary in summaries.items() if summary.episodes}
