"""A metric of a round by its key, for callbacks that watch one."""

from __future__ import annotations

from typing import Literal, TypeAlias

from grpo_fed.runs.metrics import (
    EVALUATION_RETURN,
    METRICS,
    NORMALISED_IQM,
    NORMALISED_MIN,
    NORMALISED_TRAINING,
    SCORE_IQM,
    SCORE_MIN,
    TRAINING_RETURN,
    find_metric,
)
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean
from grpo_fed.tasks.scores import are_known, scales_of, unknown_scales_cure

Mode: TypeAlias = Literal["max", "min"]
"""Whether higher or lower values are better."""
NORMALISED = {TRAINING_RETURN: NORMALISED_TRAINING, SCORE_IQM: NORMALISED_IQM, SCORE_MIN: NORMALISED_MIN}
"""Means of returns, and what stands for them where environments are unlike."""


def check_watched(name: str, metric: str, mode: str) -> None:
    """ValueError for a key that no metric has, or a mode that is none. name: of the callback."""
    if find_metric(metric) is None:
        cure = did_you_mean(closest_match(metric, METRICS))
        raise ValueError(f"{name}: metric = {metric!r}: there is no such metric{cure}")
    if mode not in ("max", "min"):
        raise ValueError(f"{name}: mode = {mode!r}: must be 'max' or 'min'")


def check_is_recorded(name: str, metric: str, scenario: Scenario) -> None:
    """ValueError for a metric of evaluations in a run that has none between its first and last round."""
    if metric.startswith(("eval/", "task/")) and not scenario.evaluate.every:
        raise ValueError(f"{name}: metric = {metric!r} is of evaluations, and evaluate.every = 0; set evaluate.every")
    scales = scales_of(scenario)
    if scales and metric in (*NORMALISED.values(), *NORMALISED, EVALUATION_RETURN):
        if not are_known(scales.values()):
            raise ValueError(f"{name}: metric = {metric!r}: {unknown_scales_cure(scales)}")
        if metric not in NORMALISED.values():
            cure = f"watch {NORMALISED.get(metric, NORMALISED_IQM)}"
            raise ValueError(f"{name}: metric = {metric!r} averages returns, and environments are unlike; {cure}")
    if not scales and metric in NORMALISED.values():
        raise ValueError(f"{name}: metric = {metric!r} is of runs with unlike environments; watch {_plain(metric)}")


def default_metric(metric: str, scenario: Scenario) -> str:
    """Return the metric that a callback watches if it was given none; the normalised one for unlike environments."""
    return NORMALISED[metric] if scales_of(scenario) else metric


def _plain(metric: str) -> str:
    return next(key for key, normalised in NORMALISED.items() if normalised == metric)


def metric_of(record: RoundRecord, metric: str) -> float | None:
    """Return a metric of the whole in a round; None if the round has none."""
    value = record_to_line(record).get(metric)
    return float(value) if isinstance(value, int | float) else None


def is_better(value: float, best: float | None, mode: str, margin: float = 0.0) -> bool:
    """Whether a value is better than the best so far by more than a margin."""
    if best is None:
        return True
    return value > best + margin if mode == "max" else value < best - margin
