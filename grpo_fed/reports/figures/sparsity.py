"""What a group penalty does by round: the share of groups at exactly zero, and the norms of the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.axis import x_axis
from grpo_fed.reports.charts import (
    MAX_LABELS,
    Drawing,
    label_line,
    line_colour,
    line_dashes,
    make_drawing,
    marker_style,
)
from grpo_fed.runs.history import History
from grpo_fed.runs.metrics import PENALTY_NORM, PENALTY_ZEROS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_penalty(history: History) -> Drawing | None:
    """Draw the share of groups at exactly zero and the norms of the blocks, means over clients; None without a penalty.

    Of many blocks those with the greatest norms are drawn.
    """
    zeros = history.server_series(PENALTY_ZEROS)
    if not np.isfinite(zeros).any():
        return None
    keys = dict.fromkeys(key for line in history.lines for key in line if key.startswith(PENALTY_NORM))
    series = {key.removeprefix(PENALTY_NORM): history.server_series(key) for key in keys}
    shown = sorted(series, key=lambda block: -float(np.nan_to_num(series[block]).max()))[:MAX_LABELS]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        known, x = np.isfinite(zeros), x_axis(history).values
        left.plot(x[known], zeros[known], color=line_colour(0), **marker_style(len(zeros)), clip_on=False)
        left.set_ylim(0, 1.02)
        left.set_title("share of groups at exactly zero")
        for index, block in enumerate(shown):
            row, style = series[block], {"color": line_colour(index), "linestyle": line_dashes(index)}
            known = np.isfinite(row)
            right.plot(x[known], row[known], **style, **marker_style(len(row)))
            label_line(right, row[known][-1], block, line_colour(index))
        right.set_ylim(bottom=0)
        right.set_title("norms of the blocks")
        for axes in (left, right):
            x_axis(history).place(axes)

    toward_zero = history.scenario.penalty.toward == "zero"
    what = "parameters" if toward_zero else "difference from the shared ones"
    caption = f"After the clients' training, mean over clients. The penalty is on the {what}."
    last = {block: series[block][np.isfinite(series[block])][-1] for block in shown}
    norms = ", ".join(f"{block} {norm:.2g}" for block, norm in last.items())
    share = zeros[np.isfinite(zeros)][-1]
    alt = f"At the end {100 * share:.0f} % of the penalised groups are exactly at zero. Norms of the blocks: {norms}."
    return make_drawing("penalty", "What the group penalty leaves", caption, alt, 2.6, paint)
