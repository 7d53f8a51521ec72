"""Numbers, counts, names and curves as text."""

from __future__ import annotations

import numpy as np

from grpo_fed.reports.formatting import (
    draw_curve,
    format_count,
    format_duration,
    format_megabytes,
    format_names,
    format_return,
    format_small,
)


def test_numbers_have_as_many_digits_as_they_need():
    assert [format_return(x) for x in (None, np.nan, 0.0, -1.234, 21.25, 1234.5, 123456.7)] == [
        *("-", "-", "0.00", "-1.23", "21.2", "1,234.5", "123,457"),
    ]
    assert [format_small(x) for x in (None, 0.01234, 1.5, -0.5)] == ["-", "0.0123", "1.50", "-0.5000"]
    assert [format_duration(x) for x in (0.04, 9.96, 12.3, 59.6, 185, 3723)] == [
        "0.0 s",
        "10.0 s",
        "12 s",
        "1:00",
        "3:05",
        "1:02:03",
    ]
    assert [format_count(1, "client"), format_count(1200, "client")] == ["1 client", "1,200 clients"]


def test_a_curve_goes_from_the_lowest_to_the_highest():
    assert draw_curve([]) == ""
    assert draw_curve([3.0, 3.0]) == "▁▁"
    assert draw_curve([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert draw_curve([-10, -1, -10]) == "▁█▁"
    assert draw_curve([0, 0, 7, 7], width=2) == "▁█"  # means of two each


def test_many_names_are_shortened():
    assert format_names(["a", "b", "c"]) == "a, b, c"
    assert format_names(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_an_amount_of_data_has_the_unit_that_fits():
    assert [format_megabytes(x) for x in (0.0123, 1.0, 1234.5)] == ["12.3 kB", "1.0 MB", "1.23 GB"]
