"""The metrics that callbacks have logged, by round."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import (
    MAX_PANELS,
    Drawing,
    line_colour,
    make_drawing,
    marker_style,
    panel_grid,
    set_round_axis,
)
from grpo_fed.runs.history import History
from grpo_fed.runs.metrics import CALLBACK

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_callbacks(history: History) -> Drawing | None:
    """Draw each metric of the whole in a panel of its own; None if no callback has logged one."""
    keys = dict.fromkeys(key for line in history.lines for key in line if key.startswith(CALLBACK))
    series = {key.removeprefix(CALLBACK): history.server_series(key) for key in keys}
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    if not series:
        return None
    shown = [*series][:MAX_PANELS]
    rows, columns = panel_grid(len(shown))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, name) in enumerate(zip(panels, shown, strict=False)):
            known = np.isfinite(series[name])
            axes.plot(
                history.rounds[known], series[name][known], color=line_colour(0), **marker_style(int(known.sum()))
            )
            axes.set_title(name)
            set_round_axis(axes, history.rounds, label=index >= len(shown) - columns)
        for axes in panels[len(shown) :]:
            axes.remove()

    last = ", ".join(f"{name} {series[name][np.isfinite(series[name])][-1]:.3g}" for name in shown)
    more = f" Shown are the first {len(shown)} of {len(series)}." if len(shown) < len(series) else ""
    caption = f"What the run's callbacks have logged.{more}"
    alt = f"Metrics of callbacks by round; at the end {last}."
    return make_drawing("callbacks", "Metrics of callbacks", caption, alt, 2.6 * rows, paint)
