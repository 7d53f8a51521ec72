"""Bytes and time of a run, by round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import (
    Drawing,
    label_line,
    line_colour,
    line_dashes,
    make_drawing,
    marker_style,
    set_round_axis,
)
from grpo_fed.reports.formatting import format_count, format_duration, format_megabytes
from grpo_fed.runs.colours import MUTED
from grpo_fed.runs.history import History
from grpo_fed.runs.records import MB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_traffic(history: History) -> Drawing | None:
    """Draw the bytes of each round, to the server and to the clients; None if no bytes were sent."""
    up, down = history.server_series("comm/MB_up"), history.server_series("comm/MB_down")
    total = np.nan_to_num(up).sum() + np.nan_to_num(down).sum()
    if not total:
        return None
    scale, unit = (1e-3, "GB") if max(np.nanmax(up), np.nanmax(down)) >= 1000 else (1.0, "MB")
    if max(np.nanmax(up), np.nanmax(down)) < 0.1:
        scale, unit = 1e3, "kB"
    sums = f"{format_megabytes(np.nansum(up))} up, {format_megabytes(np.nansum(down))} down"
    caption = f"All clients together; all rounds: {sums}"
    if (traffic := run_traffic(history)) is not None:
        caption += f"; with the evaluations before and after them {format_megabytes(sum(traffic))}"
    caption += ". Groups that did not change are not sent."
    series = {"to the server": up, "to the clients": down}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (label, values) in enumerate(series.items()):
            known = np.isfinite(values)
            style = {"color": line_colour(index), "linestyle": line_dashes(index)}
            axes.plot(history.rounds[known], values[known] * scale, **style, **marker_style(len(values)))
            label_line(axes, float(values[known][-1] * scale), label, line_colour(index))
        axes.set_ylim(0, float(np.nanmax([up, down])) * scale * 1.12)
        axes.set_ylabel(f"{unit} per round")
        set_round_axis(axes, history.rounds)

    alt = f"Bytes that were sent in each of {format_count(len(up), 'round')}; in all rounds {sums}."
    return make_drawing("bytes", "Bytes by round", caption, alt, 2.6, paint)


def run_traffic(history: History) -> tuple[float, float] | None:
    """Read the MB up and down of the whole run; None while there are no results.

    These are more than the sums over rounds, because policies are also evaluated before the first round and after the
    last.
    """
    if history.results is None:
        return None
    return history.results["bytes_up"] / MB, history.results["bytes_down"] / MB


def draw_time(history: History) -> Drawing | None:
    """Draw the seconds of each round, and environment steps per second; None if no time was recorded."""
    unit = history.scenario.unit
    panels: Mapping[str, np.ndarray] = {
        "seconds per round": history.server_series("time/round_s"),
        f"{unit} per second": history.server_series("charts/SPS"),
    }
    seconds, speed = panels.values()
    if not np.isfinite(seconds).any():
        return None
    count, total = format_count(len(seconds), "round"), format_duration(float(np.nansum(seconds)))
    caption = f"{count} in {total}; median round: {np.nanmedian(seconds):.2f} s, {np.nanmedian(speed):,.0f} {unit} per"
    caption += " second."

    def paint(figure: Figure) -> None:
        for index, (axes, (label, values)) in enumerate(zip(figure.subplots(1, 2), panels.items(), strict=True)):
            known = np.isfinite(values)
            rounds, colour = history.rounds[known], line_colour(index)
            axes.plot(rounds, values[known], color=colour, **marker_style(len(values)))
            axes.fill_between(rounds, 0, values[known], color=colour, alpha=0.15, linewidth=0)
            axes.set_ylim(0, float(np.nanmax(values)) * 1.12 or 1)
            axes.set_title(label, color=MUTED)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}")
            set_round_axis(axes, history.rounds)

    alt = f"Seconds and {unit} per second by round: {caption}"
    return make_drawing("time", "Time by round", caption, alt, 2.3, paint)
