"""Selects which numbers of a round become metrics in MLflow, and names parameters so that MLflow accepts them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grpo_fed.runs.metrics import (
    CLIENTS_FAILED,
    EQUAL_GROUPS,
    EVALUATION_COST,
    EVALUATION_RETURN,
    NORMALISED_IQM,
    NORMALISED_TRAINING,
    TRAINING_COST,
    TRAINING_RETURN,
    is_timed,
    is_tracked,
)

MOST_CLIENTS = 64
"""Clients that may have runs of their own; with more, the federation's run has quantiles over the clients instead."""
QUANTILE_METRICS = (
    EVALUATION_RETURN,
    TRAINING_RETURN,
    "losses/approx_kl",
    "losses/entropy",
    "kl/joint",
    EQUAL_GROUPS,
    TRAINING_COST,
    EVALUATION_COST,
)
"""The metrics that a federation of many clients has quantiles of."""
_REFUSED_IN_NAMES = re.compile(r"[^\w. :/-]", re.ASCII)
FIRST_CHARTS = {
    TRAINING_RETURN: "achieved/training_return",
    EVALUATION_RETURN: "achieved/evaluation_return",
    NORMALISED_TRAINING: "achieved/training_score",
    NORMALISED_IQM: "achieved/evaluation_score",
}
"""Metrics that MLflow gets a second time: its pages sort charts by the part of the name before `/`, so these are shown
before `alpha/`, whose lines are mostly flat."""
QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}


def tracked_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """Select the tracked numbers of a round's line, or of one client's part of it."""
    return {key: float(value) for key, value in line.items() if is_tracked(key) and _is_number(value)}


def with_first_charts(metrics: Mapping[str, float]) -> dict[str, float]:
    """Add the metrics that MLflow's pages show first."""
    return {**{name: metrics[key] for key, name in FIRST_CHARTS.items() if key in metrics}, **metrics}


def client_metrics(line: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each client of a round's line with its tracked numbers.

    A client that failed in the round has the federation's count of failures too, as 1.
    """
    for client, part in line.get("clients", {}).items():
        failed = {CLIENTS_FAILED: 1.0} if part.get("failure") else {}
        yield client, {**tracked_metrics(part), **failed}


def metric_keys(lines: Iterable[Mapping[str, Any]]) -> set[str]:
    """Collect the keys of all tracked numbers in these lines, of the whole and of clients."""
    return {
        key
        for line in lines
        for metrics in (tracked_metrics(line), *(metrics for _, metrics in client_metrics(line)))
        for key in metrics
    }


def client_quantiles(line: Mapping[str, Any]) -> dict[str, float]:
    """Compute quantiles over the clients of a round's line, for a federation of many."""
    clients = [metrics for _, metrics in client_metrics(line)]
    quantiles: dict[str, float] = {}
    for key in QUANTILE_METRICS:
        if values := sorted(metrics[key] for metrics in clients if key in metrics):
            quantiles |= {f"{key}_{label}": _quantile(values, share) for label, share in QUANTILES.items()}
    return quantiles


def param_name(key: str) -> str:
    """Make a name that MLflow accepts of a parameter's key, which may have a pattern such as `layers.*` in it."""
    return _REFUSED_IN_NAMES.sub("_", key)


def is_same_round(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Compare two lines without their times."""
    return bool(_without_times(first) == _without_times(second))


def _without_times(line: Mapping[str, Any]) -> Any:
    whole = {key: value for key, value in line.items() if not is_timed(key) and key != "clients"}
    clients = {
        client: {key: value for key, value in metrics.items() if not is_timed(key)}
        for client, metrics in line.get("clients", {}).items()
    }
    return whole, clients


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Interpolate linearly between the neighbours, as numpy does by default."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
