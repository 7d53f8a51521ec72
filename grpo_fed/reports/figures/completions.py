"""What language models wrote, by round and client: rewards by function, groups with equal rewards, completions cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.axis import x_axis
from grpo_fed.reports.charts import MAX_PANELS, Drawing, make_drawing, panel_grid
from grpo_fed.reports.figures.learning import paint_clients
from grpo_fed.reports.formatting import format_share
from grpo_fed.runs.history import History, fill_forward
from grpo_fed.runs.metrics import CUT, EQUAL_GROUPS, REWARD_OF, TRAINING_LENGTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = {EQUAL_GROUPS: "groups with equal rewards", CUT: "completions cut off"}
"""Panels of shares, between 0 and 1."""


def draw_completions(history: History) -> Drawing | None:
    """Draw each function's reward, the shares of equal groups and of completions cut off, and the length.

    None if no client has prompts.
    """
    answering = np.flatnonzero(np.isfinite(history.client_series(EQUAL_GROUPS)).any(axis=0))
    if not answering.size:
        return None
    panels = _panels(history)
    rows, columns = panel_grid(len(panels))
    caption = "Of each client's completions in training: the mean reward by function; the share of groups whose"
    caption += " completions were rewarded equally, which teach nothing; the share that was cut off at"
    caption += " language.length; and the mean length."

    def paint(figure: Figure) -> None:
        axes_of = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, (title, series)) in enumerate(zip(axes_of, panels.items(), strict=False)):
            paint_clients(axes, history, fill_forward(series), answering)  # all, so that colours are those of clients
            axes.set_title(title)
            x_axis(history).place(axes, label=index >= len(panels) - columns)
            if title in SHARES.values():
                axes.set_ylim(-0.04, 1.04)
                axes.yaxis.set_major_formatter(lambda value, _: format_share(value))
        for axes in axes_of[len(panels) :]:
            axes.remove()

    ends = [f"{title} {_mean_at_the_end(series)}" for title, series in panels.items()]
    alt = f"Completions by round; means over clients at the end: {', '.join(ends)}."
    return make_drawing("completions", f"Completions by {x_axis(history).short}", caption, alt, 2.5 * rows, paint)


def _panels(history: History) -> Mapping[str, np.ndarray]:
    """Collect the series [R, K] of each panel by its title."""
    parts = (part for line in history.lines for part in line["clients"].values())
    keys = dict.fromkeys(key for part in parts for key in part if key.startswith(REWARD_OF))
    rewards = {f"reward {key.removeprefix(REWARD_OF)}": history.client_series(key) for key in keys}
    shown = dict(list(rewards.items())[: MAX_PANELS - 3])
    shares = {title: history.client_series(key) for key, title in SHARES.items()}
    has_prompts = np.isfinite(history.client_series(EQUAL_GROUPS))
    length = np.where(has_prompts, history.client_series(TRAINING_LENGTH), np.nan)
    return {**shown, **shares, "tokens of a completion": length}


def _mean_at_the_end(series: np.ndarray) -> str:
    last = fill_forward(series)[-1]
    return f"{np.nanmean(last):.2f}" if np.isfinite(last).any() else "unknown"
