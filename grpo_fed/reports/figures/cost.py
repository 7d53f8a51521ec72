"""What a run cost: bytes and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import Drawing, by_round, colour_of, dash_of, drawing, label_end, marks
from grpo_fed.reports.tables import many, span
from grpo_fed.runs.colours import MUTED
from grpo_fed.runs.history import History
from grpo_fed.runs.records import MB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def traffic(history: History) -> Drawing | None:
    """Bytes of each round, up and down."""
    up, down = history.server_series("comm/MB_up"), history.server_series("comm/MB_down")
    total = np.nan_to_num(up).sum() + np.nan_to_num(down).sum()
    if not total:
        return None
    scale, unit = (1e-3, "GB") if max(np.nanmax(up), np.nanmax(down)) >= 1000 else (1.0, "MB")
    if max(np.nanmax(up), np.nanmax(down)) < 0.1:
        scale, unit = 1e3, "kB"
    sums = f"{megabytes(np.nansum(up))} up, {megabytes(np.nansum(down))} down"
    caption = f"Of all clients together; in all rounds {sums}"
    if (whole := whole_traffic(history)) is not None:
        caption += f", and with the plays before and after them {megabytes(sum(whole))}"
    caption += ". Groups that nobody moved are not sent."
    rows = {"to the server": up, "to the clients": down}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (label, row) in enumerate(rows.items()):
            seen = np.isfinite(row)
            style = {"color": colour_of(place), "linestyle": dash_of(place)}
            axes.plot(history.rounds[seen], row[seen] * scale, **style, **marks(len(row)))
            label_end(axes, float(row[seen][-1] * scale), label, colour_of(place))
        axes.set_ylim(0, float(np.nanmax([up, down])) * scale * 1.12)
        axes.set_ylabel(f"{unit} a round")
        by_round(axes, history.rounds)

    alt = f"Bytes that were sent in each of {many(len(up), 'round')}; in all {sums}."
    return drawing("bytes", "Bytes by round", caption, alt, 2.6, paint)


def whole_traffic(history: History) -> tuple[float, float] | None:
    """MB up and down of the whole run, which lines of rounds do not tell: policies also play before the first round
    and after the last. None while there are no results.
    """
    if history.results is None:
        return None
    return history.results["bytes_up"] / MB, history.results["bytes_down"] / MB


def megabytes(value: float) -> str:
    """As GB, MB or kB."""
    if value >= 1000:
        return f"{value / 1000:,.2f} GB"
    return f"{value:,.1f} MB" if value >= 1 else f"{value * 1000:,.1f} kB"


def pace(history: History) -> Drawing | None:
    """Seconds of each round, and environment steps a second."""
    panels: Mapping[str, np.ndarray] = {
        "seconds a round": history.server_series("time/round_s"),
        "steps a second": history.server_series("charts/SPS"),
    }
    seconds = panels["seconds a round"]
    if not np.isfinite(seconds).any():
        return None
    caption = f"{many(len(seconds), 'round')} in {span(float(np.nansum(seconds)))}, and in the median round"
    caption += f" {np.nanmedian(seconds):.2f} s, {np.nanmedian(panels['steps a second']):,.0f} steps a second."

    def paint(figure: Figure) -> None:
        for place, (axes, (label, row)) in enumerate(zip(figure.subplots(1, 2), panels.items(), strict=True)):
            seen = np.isfinite(row)
            axes.plot(history.rounds[seen], row[seen], color=colour_of(place), **marks(len(row)))
            axes.fill_between(history.rounds[seen], 0, row[seen], color=colour_of(place), alpha=0.15, linewidth=0)
            axes.set_ylim(0, float(np.nanmax(row)) * 1.12 or 1)
            axes.set_title(label, color=MUTED)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}")
            by_round(axes, history.rounds)

    return drawing("time", "Time by round", caption, f"Seconds and steps a second by round: {caption}", 2.3, paint)
