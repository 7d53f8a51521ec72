"""What a limit on costs does by round: each client's mean cost beside the limit, and the price that keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.axis import x_axis
from grpo_fed.reports.charts import Drawing, make_drawing
from grpo_fed.reports.figures.learning import paint_clients
from grpo_fed.reports.formatting import format_count
from grpo_fed.runs.colours import MUTED
from grpo_fed.runs.history import History
from grpo_fed.runs.metrics import COST_MULTIPLIER, TRAINING_COST

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_costs(history: History) -> Drawing | None:
    """Draw the mean cost of training episodes by client with the limit, and the multipliers; None without a limit."""
    limit, costs = history.scenario.objective.cost.limit, history.client_series(TRAINING_COST)
    if limit is None or not np.isfinite(costs).any():
        return None
    prices = history.client_series(COST_MULTIPLIER)
    selected = np.flatnonzero(np.isfinite(costs).any(axis=0))

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.axhline(limit, color=MUTED, linestyle="--", linewidth=1.2)
        paint_clients(left, history, costs, selected)
        left.set_title("mean cost of an episode")
        paint_clients(right, history, prices, selected)
        right.set_title("price of costs")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            x_axis(history).place(axes)

    known = [costs[np.isfinite(costs[:, client]), client] for client in selected]
    last = np.array([series[-1] for series in known])
    caption = (
        "Training episodes that ended in the round. Dashed: the limit. Right: the Lagrange multiplier of each client."
    )
    alt = (
        f"At the end {int((last <= limit).sum())} of {format_count(len(last), 'client')} cost no more than the limit of"
        f" {limit:g}; the mean cost is {last.mean():.3g}, at most {last.max():.3g}."
    )
    return make_drawing("costs", "Costs beside their limit", caption, alt, 3.0, paint)
