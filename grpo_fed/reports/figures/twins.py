"""What sharing brings each client, by round, as its twin tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.federation.twins import MARGIN
from grpo_fed.reports.axis import x_axis
from grpo_fed.reports.charts import (
    MAX_LABELS,
    MAX_SINGLE_CLIENTS,
    Drawing,
    label_line,
    line_colour,
    line_dashes,
    make_drawing,
    marker_style,
)
from grpo_fed.reports.formatting import format_count
from grpo_fed.reports.twins_section import latest_verdicts
from grpo_fed.runs.colours import MUTED
from grpo_fed.runs.history import History, fill_forward
from grpo_fed.runs.metrics import TWIN_GAIN, TWIN_GAIN_HIGH, TWIN_GAIN_LOW
from grpo_fed.runs.sharing_verdicts import verdicts_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BANDS = 4
"""Clients up to which the intervals are drawn by round; of more only the last ones."""


def draw_twins(history: History) -> Drawing | None:
    """Draw the mean of what sharing brought each client so far, by round; None without twins."""
    verdicts = latest_verdicts(history)
    series = [fill_forward(history.client_series(key)) for key in (TWIN_GAIN, TWIN_GAIN_LOW, TWIN_GAIN_HIGH)]
    gains, lows, highs = (100 * values for values in series)
    shown = [k for k, name in enumerate(history.clients) if name in verdicts]
    if not shown:
        return None
    shown = sorted(sorted(shown, key=lambda k: float(gains[-1, k]))[:MAX_SINGLE_CLIENTS])

    def paint(figure: Figure) -> None:
        axes, axis = figure.subplots(), x_axis(history)
        axes.axhspan(-100 * MARGIN, 100 * MARGIN, color=MUTED, alpha=0.15, linewidth=0)
        for index, k in enumerate(shown):
            style = {"color": line_colour(index), "linestyle": line_dashes(index), "linewidth": 1.5}
            axes.plot(axis.values, gains[:, k], **style, **marker_style(len(axis.values)))
            if len(shown) <= MAX_BANDS:
                axes.fill_between(
                    axis.values, lows[:, k], highs[:, k], color=line_colour(index), alpha=0.12, linewidth=0
                )
            if len(shown) <= MAX_LABELS:
                label_line(axes, float(gains[-1, k]), history.clients[k], line_colour(index))
        axes.set_ylim(-105, 105)
        axis.place(axes)
        axes.set_ylabel("sharing brings, %")

    caption = (
        "Lines: the mean over the rounds so far of a client's training return less its twin's, as a part of what the"
        " better of the two has learned. A twin learns the same task alone."
    )
    caption += " Bands: intervals that hold at 95 % at any time." if len(shown) <= MAX_BANDS else ""
    caption += " Grey: too little for a verdict."
    if len(shown) < len(verdicts):
        caption += f" Shown are the {len(shown)} of {format_count(len(verdicts), 'client')} to which it brings least."
    low, high = np.nanmin(gains[-1, shown]), np.nanmax(gains[-1, shown])
    alt = f"{verdicts_line(verdicts).capitalize()}; it brings {low:+.0f} % to {high:+.0f} %."
    return make_drawing("twins", f"What sharing brings, by {x_axis(history).short}", caption, alt, 3.4, paint)
