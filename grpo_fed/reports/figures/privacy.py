"""What privacy costs by round: epsilon beside its budget, and the bounds to which differences are cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import Drawing, label_line, line_colour, make_drawing, marker_style, set_round_axis
from grpo_fed.runs.colours import MUTED
from grpo_fed.runs.history import History
from grpo_fed.runs.metrics import PRIVACY_BOUND, PRIVACY_EPSILON

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_privacy(history: History) -> Drawing | None:
    """Draw epsilon and its budget, and the bound of each block; None for a run without privacy."""
    budget, epsilons = history.scenario.privacy.epsilon, history.server_series(PRIVACY_EPSILON)
    if budget is None or not np.isfinite(epsilons).any():
        return None
    bounds = {block: history.server_series(f"{PRIVACY_BOUND}{block}") for block in history.blocks}

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.axhline(budget, color=MUTED, linestyle="--", linewidth=1.2)
        left.plot(history.rounds, epsilons, color=line_colour(0), **marker_style(len(epsilons)))
        left.set_title("epsilon")
        for index, (block, series) in enumerate(bounds.items()):
            right.plot(history.rounds, series, color=line_colour(index), **marker_style(len(series)))
            label_line(right, float(series[-1]), block, line_colour(index))
        right.set_title("bound of a client's difference")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            set_round_axis(axes, history.rounds)

    last = float(epsilons[np.isfinite(epsilons)][-1])
    caption = "Left: what the merges so far have spent; dashed: the budget. Right: the length to which each block of a"
    caption += " client's difference is cut in the next round."
    ends = ", ".join(f"{block} {series[-1]:.3g}" for block, series in bounds.items())
    alt = f"At the end epsilon is {last:.3g} of {budget:g}; bounds: {ends}."
    return make_drawing("privacy", "What privacy costs", caption, alt, 2.8, paint)
