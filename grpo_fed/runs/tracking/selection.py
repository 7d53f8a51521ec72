"""What of a round's line becomes metrics: finite numbers under names that we know."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grpo_fed.runs.metrics import CLIENTS_FAILED, EVALUATION_RETURN, TRAINING_RETURN, is_timed, is_tracked

MOST_CLIENTS = 64
"""Above so many, clients have no runs of their own: their quantiles stand in the federation's."""
SPREAD = (EVALUATION_RETURN, TRAINING_RETURN, "losses/approx_kl", "losses/entropy", "kl/joint")
"""Of these a federation of many clients has quantiles."""
QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}


def tracked_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """Of the whole or of a client: the numbers that are tracked."""
    return {name: float(value) for name, value in line.items() if is_tracked(name) and _is_number(value)}


def client_metrics(line: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """By client, its metrics; one that failed in this round says so under the federation's own key."""
    for client, own in line.get("clients", {}).items():
        failed = {CLIENTS_FAILED: 1.0} if own.get("failure") else {}
        yield client, {**tracked_metrics(own), **failed}


def names_in(lines: Iterable[Mapping[str, Any]]) -> set[str]:
    """Of the metrics that the whole or some client has."""
    return {
        name
        for line in lines
        for own in (tracked_metrics(line), *(own for _, own in client_metrics(line)))
        for name in own
    }


def spread_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Quantiles over the clients, for federations of many."""
    members = [own for _, own in client_metrics(line)]
    found: dict[str, float] = {}
    for name in SPREAD:
        if values := sorted(own[name] for own in members if name in own):
            found |= {f"{name}_{label}": _quantile(values, share) for label, share in QUANTILES.items()}
    return found


def same_round(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two lines tell the same, but for how long it took."""
    return bool(_timeless(one) == _timeless(other))


def _timeless(line: Mapping[str, Any]) -> Any:
    own = {name: value for name, value in line.items() if not is_timed(name) and name != "clients"}
    clients = {
        client: {name: value for name, value in metrics.items() if not is_timed(name)}
        for client, metrics in line.get("clients", {}).items()
    }
    return own, clients


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy's default."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
