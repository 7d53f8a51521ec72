"""Returns of clients while their policies adapt to their tasks, by local update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import (
    MAX_LABELS,
    MAX_SINGLE_CLIENTS,
    Drawing,
    label_line,
    line_colour,
    line_dashes,
    make_drawing,
    marker_style,
    set_round_axis,
)
from grpo_fed.reports.formatting import format_count, format_return
from grpo_fed.runs.colours import INK, MUTED
from grpo_fed.runs.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_adaptation(history: History) -> Drawing | None:
    """Draw the return before, and after each local update, of the last policies and of the first; None without any.

    Only clients that take no part in training are shown, or all if there are none.
    """
    known = history.adapts & np.isfinite(history.adapted_last).all(axis=1)
    if not history.scenario.evaluate.adapt or not known.any():
        return None
    last, first = history.adapted_last[known], history.adapted_first[known]
    first = first[np.isfinite(first).all(axis=1)]
    names = [name for name, is_known in zip(history.clients, known, strict=True) if is_known]
    updates = np.arange(last.shape[1])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if len(names) <= MAX_SINGLE_CLIENTS:
            _paint_clients(axes, last, names)
        if len(names) > 1:
            axes.plot(updates, last.mean(axis=0), color=INK, linewidth=2, zorder=4, **marker_style(len(updates)))
            label_line(axes, float(last[:, -1].mean()), "mean", INK, "bold")
        if len(first):
            axes.plot(updates, first.mean(axis=0), color=MUTED, linestyle=line_dashes(7), linewidth=1.6)
            label_line(axes, float(first[:, -1].mean()), "first policies", MUTED)
        set_round_axis(axes, updates)
        axes.set_xlabel("local updates")
        axes.set_ylabel("return")

    who = "clients that took no part in training" if not history.trains.all() else "all clients"
    caption = f"Lines: {who}, from the policy at the end of the run."
    caption += " Thick line: their mean." if len(names) > 1 else ""
    caption += " Grey: their mean from the policy before the first round." if len(first) else ""
    start, end = format_return(float(last[:, 0].mean())), format_return(float(last[:, -1].mean()))
    after = format_count(len(updates) - 1, "local update")
    alt = f"Mean return of {format_count(len(names), 'client')}: {start} before, {end} after {after}."
    return make_drawing("adaptation", "Return by local update", caption, alt, 3.2, paint)


def _paint_clients(axes: Axes, curves: np.ndarray, names: list[str]) -> None:
    """Paint the curve of each client, [k, U + 1]; few have their names beside them."""
    updates = np.arange(curves.shape[1])
    for k, (name, curve) in enumerate(zip(names, curves, strict=True)):
        style = {"color": line_colour(k), "linestyle": line_dashes(k), "linewidth": 1.3}
        axes.plot(updates, curve, **style, **marker_style(len(updates)))
        if len(names) <= MAX_LABELS:
            label_line(axes, float(curve[-1]), name, line_colour(k))
