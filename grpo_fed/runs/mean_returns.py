"""Means of returns over clients: of all where they have one scale, else of normalised scores and by environment.

clients: the metrics of each client. scales: as `tasks.scores.scales_of`, by the scenario's entries; empty if all
returns have one scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grpo_fed.runs.line_numbers import mean_of_known
from grpo_fed.runs.metrics import (
    ADAPTATION,
    ADAPTED_RETURN,
    EVALUATION_RETURN,
    NORMALISED_IQM,
    NORMALISED_MIN,
    NORMALISED_TRAINING,
    OF_ENVIRONMENT,
    SCORE_IQM,
    SCORE_MIN,
    TRAINING_RETURN,
    TWIN_RETURN,
    TWIN_SINCE,
)
from grpo_fed.runs.statistics import iqm
from grpo_fed.tasks.scores import ReturnScale, are_known

RETURNS = (EVALUATION_RETURN, TRAINING_RETURN, ADAPTED_RETURN, TWIN_RETURN)
Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class MeanReturns:
    """Summarises returns of several clients."""

    iqm: float
    """Their interquartile mean (2108.13264)."""
    mean: float
    min: float
    """That of the worst client."""

    @classmethod
    def of(cls, returns: Sequence[float]) -> MeanReturns | None:
        """Summarise returns; None if there are none."""
        values = np.array(returns)
        return cls(iqm(values), float(values.mean()), float(values.min())) if values.size else None


def returns_by_environment(returns: Iterable[tuple[ReturnScale, float]]) -> dict[str, list[float]]:
    """Group returns by what they are of."""
    grouped: dict[str, list[float]] = {}
    for scale, value in returns:
        grouped.setdefault(scale.label, []).append(value)
    return grouped


def normalised_returns(returns: Iterable[tuple[ReturnScale, float]], scales: Iterable[ReturnScale]) -> list[float]:
    """Normalise returns; none if that of some client could not be. scales: those of all clients of the run."""
    return [scale.normalise(value) for scale, value in returns] if are_known(scales) else []


def score_metrics(clients: Sequence[tuple[str, Metrics]], scales: Mapping[str, ReturnScale]) -> dict[str, float | None]:
    """Summarise the evaluation returns of the clients that train. clients: each with its entry's name."""
    scores = [(entry, value) for entry, metrics in clients if (value := metrics.get(EVALUATION_RETURN)) is not None]
    if not scales:
        found = MeanReturns.of([value for _, value in scores])
        return {SCORE_IQM: None, SCORE_MIN: None} if found is None else {SCORE_IQM: found.iqm, SCORE_MIN: found.min}
    line: dict[str, float | None] = {SCORE_IQM: None, SCORE_MIN: None}
    of_scale = [(scales[entry], value) for entry, value in scores]
    if (normalised := MeanReturns.of(normalised_returns(of_scale, scales.values()))) is not None:
        line |= {NORMALISED_IQM: normalised.iqm, NORMALISED_MIN: normalised.min}
    for key in (EVALUATION_RETURN, TRAINING_RETURN, ADAPTED_RETURN):
        returns = [(scales[entry], value) for entry, part in clients if (value := part.get(key)) is not None]
        if key == TRAINING_RETURN and (training := MeanReturns.of(normalised_returns(returns, scales.values()))):
            line[NORMALISED_TRAINING] = training.mean
        for label, values in returns_by_environment(returns).items():
            line[f"{OF_ENVIRONMENT}{label.replace(':', '.')}/{key}"] = float(np.mean(values))
    return line


def mean_metrics(clients: Sequence[Metrics], with_returns: bool = True) -> dict[str, float | None]:
    """Average every metric over the clients that have it, but no numbers of rounds.

    with_returns: False leaves out returns, which have no mean over unlike environments.
    """
    keys = dict.fromkeys(key for metrics in clients for key in metrics if key != TWIN_SINCE)
    kept = [key for key in keys if with_returns or not (key in RETURNS or key.startswith(ADAPTATION))]
    return {key: mean_of_known(metrics.get(key) for metrics in clients) for key in kept}
