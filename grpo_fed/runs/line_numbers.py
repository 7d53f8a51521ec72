"""Numbers as a line of rounds.jsonl has them: JSON knows neither NaN nor infinity, and a line has hundreds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Average the numbers that are known; None if there are none, or if the mean is not finite."""
    known = [value for value in values if value is not None]
    return finite_or_none(float(np.mean(known))) if known else None


def four_digits(value: float) -> float | None:
    """Round a number that nobody reads to more than four digits, and that a line may have hundreds of."""
    return finite_or_none(round(value, 4))


def finite_or_none(value: float | None) -> float | None:
    """Return the number, or None for NaN and infinity, which JSON does not have."""
    return None if value is None or not np.isfinite(value) else value


def finite_values(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Replace what is not finite by None."""
    return {key: finite_or_none(value) for key, value in metrics.items()}
