"""A metric of a round by its key, for callbacks that watch one."""

from __future__ import annotations

from typing import Literal, TypeAlias

from grpo_fed.runs.metrics import METRICS, find_metric
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean

Mode: TypeAlias = Literal["max", "min"]
"""Whether higher or lower values are better."""


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


def metric_of(record: RoundRecord, metric: str) -> float | None:
    """Return a metric of the whole in a round; None if the round has none."""
    value = record_to_line(record).get(metric)
    return float(value) if isinstance(value, int | float) else None


def is_better(value: float, best: float | None, mode: str, margin: float = 0.0) -> bool:
    """Whether a value is better than the best so far by more than a margin."""
    if best is None:
        return True
    return value > best + margin if mode == "max" else value < best - margin
