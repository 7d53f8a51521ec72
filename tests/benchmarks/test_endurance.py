"""Slopes of what is measured over time, and the table of faults."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from benchmarks.endurance import QUANTITIES, Slope, fit_slope, format_table
from benchmarks.faults import format_table as format_faults
from benchmarks.local_faults import Outcome


def test_a_line_has_its_slope_without_an_interval():
    seconds = np.arange(0, 7200, 10.0)
    slope = fit_slope(seconds, 5 + 3 * seconds / 3600)
    assert (slope.per_hour, slope.low, slope.high) == pytest.approx((3, 3, 3))
    assert not slope.is_flat


def test_a_slope_has_students_interval_of_the_means_of_twenty_parts():
    """Worked by hand: b = Sxy / Sxx, its variance (Syy - b Sxy) / 18 / Sxx, times 2.1009 for 18 degrees of freedom."""
    rng = np.random.default_rng(0)
    seconds = np.arange(0, 4000, 10.0)
    values = 100 + rng.standard_normal(400)
    late = slice(40, None)
    x, y = (each[late].reshape(20, 18).mean(1) for each in (seconds / 3600, values))
    dx, dy = x - x.mean(), y - y.mean()
    b = (dx @ dy) / (dx @ dx)
    reach = 2.1009220402 * np.sqrt((dy @ dy - b * (dx @ dy)) / 18 / (dx @ dx))
    slope = fit_slope(seconds, values)
    assert (slope.per_hour, slope.low, slope.high) == pytest.approx((b, b - reach, b + reach))
    assert slope.is_flat


def test_too_few_samples_have_no_slope():
    with pytest.raises(ValueError, match="39 samples are too few"):
        fit_slope(range(39), range(39))


def test_a_quantity_that_grows_slowly_is_flat():
    assert Slope(100.0, 0.2, 0.1, 0.3).is_flat, "7.2 in a day"
    assert not Slope(100.0, 0.4, 0.3, 0.5).is_flat, "12 in a day"


def test_the_tables_name_every_quantity_and_every_kind_of_fault():
    slopes = {name: asdict(Slope(100.0, 0.0, -1.0, 1.0)) for name in QUANTITIES}
    line = {"engine": "local", "runs": 1, "clients": 64, "rounds": 2000, "hours": 0.5, "failures": 0, "slopes": slopes}
    text = "\n".join(format_table([line]))
    assert text.startswith("local: a run of 64 clients, 2,000 rounds in 0.50 hours, 0 answers missing.")
    assert all(f"| {words} | 100 | 0 [-1.00, 1.00] |" in text for words in QUANTITIES.values())
    outcomes = [Outcome("a kill", True, 1, 0, 2.0), Outcome("a kill", False, 0, 0, 4.0, "why")]
    text = "\n".join(format_faults([{"part": "local", **asdict(outcome)} for outcome in outcomes]))
    assert "1 of 2 faults survived: 2 (local)." in text
    assert "| local | a kill | 2 | 1 | 1 | 0 | 3.0 (4.0) |" in text
