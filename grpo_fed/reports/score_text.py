"""The scores of a run in words: one mean where all clients have one environment, else normalised or by environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grpo_fed.reports.formatting import format_return, short_task
from grpo_fed.runs.metrics import EVALUATION_RETURN, NORMALISED_TRAINING, OF_ENVIRONMENT, TRAINING_RETURN
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import shorten
from grpo_fed.tasks.scores import are_known, scales_of, unknown_scales_cure

MOST_ENVIRONMENTS = 4
"""How many environments a line names."""
LONGEST_LABEL = 40
"""Characters of an environment's name in a line."""


def scores_text(scores: Mapping[str, Any], is_single: bool) -> str:
    """Describe the scores of a run that has ended; empty without any.

    scores: `eval` of `results.json`. is_single: whether one client alone takes part in training.
    """
    if scores["score_mean"] is not None:
        text = f"return {format_return(scores['score_mean'])}"
        return text if is_single else f"{text} ({_spread(scores, 'score')})"
    if scores.get("normalised_mean") is not None:
        text = f"normalised score {format_return(scores['normalised_mean'])}"
        return f"{text} ({_spread(scores, 'normalised')}; 0 is random, 1 the reference)"
    means = {label: part["mean"] for label, part in scores.get("by_environment", {}).items()}
    return f"return {by_environment_text(means)}" if means else ""


def explain_scores(scenario: Scenario) -> Iterator[str]:
    """Explain what stands for mean returns where clients have unlike environments."""
    scales = scales_of(scenario)
    if not scales:
        return
    if not are_known(scales.values()):
        yield f"Returns are averaged in each environment by itself, since {unknown_scales_cure(scales)}."
        return
    yield "Environments are unlike, so scores are normalised, 0 for random actions and 1 for a reference:"
    for label, scale in {scale.label: scale for scale in scales.values()}.items():
        yield f"a return of {scale.random:g} is 0 and one of {scale.reference:g} is 1 in {label}."


def by_environment_text(means: Mapping[str, float]) -> str:
    """Write the mean returns of environments: `by environment: CartPole-v1 480.0, Pendulum-v1 -150.2`."""
    named = [f"{shorten(short_task(label), LONGEST_LABEL)} {format_return(mean)}" for label, mean in means.items()]
    more = f" and {len(named) - MOST_ENVIRONMENTS} more" if len(named) > MOST_ENVIRONMENTS else ""
    return f"by environment: {', '.join(named[:MOST_ENVIRONMENTS])}{more}"


def mixed_round_parts(record: RoundRecord) -> list[str]:
    """Describe the returns of a round of clients with unlike environments: training, and the evaluation if there was
    one.
    """
    line, parts = record_to_line(record), []
    normalised = line.get(NORMALISED_TRAINING)
    if normalised is not None:
        parts.append(f"normalised {format_return(normalised)}")
    training = _means_of(line, TRAINING_RETURN)
    parts += [f"return {by_environment_text(training)}"] if training and normalised is None else []
    evaluated = _means_of(line, EVALUATION_RETURN)
    return parts + ([f"evaluated {by_environment_text(evaluated)}"] if evaluated else [])


def _means_of(line: Mapping[str, Any], key: str) -> dict[str, float]:
    """Select the environments' means of a metric from a round's line."""
    ends = f"/{key}"
    found = {name: value for name, value in line.items() if name.startswith(OF_ENVIRONMENT) and name.endswith(ends)}
    return {name.removeprefix(OF_ENVIRONMENT).removesuffix(ends): value for name, value in found.items()}


def _spread(scores: Mapping[str, Any], kind: str) -> str:
    middle, worst = format_return(scores[f"{kind}_iqm"]), format_return(scores[f"{kind}_min"])
    return f"interquartile mean {middle}, worst {worst}"
