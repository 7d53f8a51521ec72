"""The server's steps by round: their KL against the budgets, and the fraction of each step that was taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fed.reports.axis import x_axis
from grpo_fed.reports.charts import (
    MAX_LABELS,
    MAX_PANELS,
    Drawing,
    label_line,
    line_colour,
    line_dashes,
    make_drawing,
    marker_style,
    panel_grid,
    scaled,
    set_round_axis,
)
from grpo_fed.reports.formatting import format_count, format_names
from grpo_fed.runs.colours import INK, MUTED
from grpo_fed.runs.history import History, fill_forward

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JOINT = "all blocks"
"""Name of the step of all blocks together, which the metrics call `joint`."""


def draw_kl(history: History) -> Drawing | None:
    """Draw the KL of the server's step against the budget, for each block and for all together.

    Of many blocks the share of each budget that was used is drawn as a map. None if no KL is known.
    """
    names = [name for name in ("joint", *history.blocks) if np.isfinite(history.server_series(f"kl/{name}")).any()]
    if not names:
        return None
    if len(names) > MAX_PANELS:
        return _draw_budget_use(history, names)
    rows, columns = panel_grid(len(names))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
            _paint_kl(axes, history, name)
            axes.set_title(_title(name))
            x_axis(history).place(axes, label=index >= len(names) - columns)
            if index % columns == 0:
                axes.set_ylabel("KL")
        for axes in panels[len(names) :]:
            axes.remove()

    alt = f"KL of each round's step against its budget: {'; '.join(_describe_kl(history, name) for name in names)}."
    title, caption = "KL of the server's step against its budget", _kl_caption(history, names)
    return make_drawing("kl", title, caption, alt, max(2.6, 1.95 * rows), paint)


def _kl_caption(history: History, names: Sequence[str]) -> str:
    """Say how to read the panels."""
    proximity = history.scenario.proximity
    source = "predicted from Fisher information" if proximity.mode == "quadratic" else "measured"
    clients = "mean over clients" if proximity.over == "mean" else "worst client"
    caption = f"Line: KL of the accepted step, {source}, {clients}."
    has_budget = any(np.isfinite(history.server_series(f"budget/{name}")).any() for name in names)
    caption += " Dashes: the budget." if has_budget else " There is no budget."
    if any(_is_beyond_budget(history, name).any() for name in names):
        caption += " Triangles: the whole step would have exceeded it."
    if any(np.isfinite(_measured_later(history, name)).any() for name in names):
        caption += " Crosses: the same KL as clients measured it in the next round."
    return caption


def _title(name: str) -> str:
    return JOINT if name == "joint" else name


def _is_beyond_budget(history: History, name: str) -> np.ndarray:
    """Mark the rounds whose whole step would have exceeded the budget, [R] bool."""
    beyond: np.ndarray = history.server_series(f"wanted/{name}") > history.server_series(f"budget/{name}")
    return beyond


def _measured_later(history: History, name: str) -> np.ndarray:
    """Read the KL of each round's step as clients measured it in the next round, [R]."""
    return np.append(history.server_series(f"last_kl/{name}")[1:], np.nan)


def _paint_kl(axes: Axes, history: History, name: str) -> None:
    """Paint one block's KL and budget."""
    axis = x_axis(history)
    rounds = axis.values
    kl, budget = history.server_series(f"kl/{name}"), fill_forward(history.server_series(f"budget/{name}"))
    whole_step_kl, later = history.server_series(f"wanted/{name}"), _measured_later(history, name)
    beyond = whole_step_kl > budget
    known = np.isfinite(kl)
    axes.plot(rounds[known], kl[known], color=line_colour(0), **marker_style(len(rounds)))
    axes.fill_between(rounds[known], 0, kl[known], color=line_colour(0), alpha=0.15, linewidth=0)
    top = float(np.nanmax([np.nanmax(kl), *budget, *later])) * 1.25 or 1e-6
    if np.isfinite(budget).any():
        # the edges make it visible in a run of one round too
        axes.plot(axis.edges, np.append(budget, budget[-1]), color=line_colour(1), linestyle=(0, (4, 2)), linewidth=1.4)
    if beyond.any():
        # a triangle at the top means more than that; a higher axis would flatten the line
        axes.plot(rounds[beyond], np.minimum(whole_step_kl[beyond], top), "^", color=MUTED, alpha=0.6, markersize=3.5)
    if np.isfinite(later).any():
        axes.plot(rounds, later, "x", color=INK, markersize=4)
    axes.set_ylim(0, top * 1.02)


def _describe_kl(history: History, name: str) -> str:
    """Say a block's highest KL and its budget."""
    kl, budget = history.server_series(f"kl/{name}"), history.server_series(f"budget/{name}")
    text = f"{_title(name)} at most {np.nanmax(kl):.2g}"
    return f"{text} of {np.nanmax(budget):.2g}" if np.isfinite(budget).any() else f"{text}, no budget"


def _draw_budget_use(history: History, names: Sequence[str]) -> Drawing | None:
    """Draw the share of its budget that each of many blocks used; None if no block has a budget."""
    used = np.stack([history.server_series(f"kl/{name}") / history.server_series(f"budget/{name}") for name in names])
    if not np.isfinite(used).any():
        return None
    caption = "Share of the KL budget that each block used, and all together."
    blocks = format_count(len(names) - 1, "block")
    alt = f"Share of the KL budget used by round, for {blocks}: at most {np.nanmax(used):.2f}."
    labels = [_title(name) for name in names]
    return _draw_map("kl", "KL of the server's step as a share of its budget", caption, alt, history, labels, used)


def draw_steps(history: History) -> Drawing | None:
    """Draw alpha of each block: the fraction of the step to the merge that was taken; None without KL budgets."""
    if not history.blocks or history.scenario.proximity.mode == "off":
        return None
    alphas = np.stack([history.server_series(f"alpha/{block}") for block in history.blocks])
    if not np.isfinite(alphas).any():
        return None
    title = "Fraction of the step that was taken"
    caption = "1: the block moved all the way to the merged values. 0: it did not move."
    means = [f"{block} {np.nanmean(row):.2f}" for block, row in zip(history.blocks, alphas, strict=True)]
    alt = f"Fraction of the step that was taken, mean over the rounds: {', '.join(means)}."
    if len(history.blocks) > MAX_LABELS:
        return _draw_map("steps", title, caption, alt, history, history.blocks, alphas)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (blocks, row) in enumerate(_merge_equal_rows(history.blocks, alphas)):
            known = np.isfinite(row)
            if known.any():
                style = {"color": line_colour(index), "linestyle": line_dashes(index)}
                axes.plot(x_axis(history).values[known], row[known], **style, **marker_style(len(row)), clip_on=False)
                whole = len(blocks) == len(history.blocks) > 1
                label_line(axes, row[known][-1], JOINT if whole else format_names(blocks, 2), line_colour(index))
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("alpha")
        x_axis(history).place(axes)

    return make_drawing("steps", title, caption, alt, 2.6, paint)


def _merge_equal_rows(blocks: Sequence[str], rows: np.ndarray) -> list[tuple[list[str], np.ndarray]]:
    """Collect the blocks whose rows of [B, R] are equal, since of lines upon each other only the last is visible."""
    merged: dict[bytes, tuple[list[str], np.ndarray]] = {}
    for block, row in zip(blocks, rows, strict=True):
        merged.setdefault(np.nan_to_num(row, nan=-1.0).tobytes(), ([], row))[0].append(block)
    return list(merged.values())


def _draw_map(
    name: str, title: str, caption: str, alt: str, history: History, labels: Sequence[str], values: np.ndarray
) -> Drawing:
    """Draw values [B, R] from 0 to 1 as cells, with a row for each block."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        rounds = history.rounds
        extent = (rounds[0] - 0.5, rounds[-1] + 0.5, len(labels) - 0.5, -0.5)
        image: Any = axes.imshow(
            values, cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest"
        )
        axes.grid(False)
        stride = -(-len(labels) // 40)
        axes.set_yticks(np.arange(0, len(labels), stride), labels=labels[::stride])
        axes.tick_params(axis="y", length=0, labelsize=scaled(8))
        set_round_axis(axes, rounds)
        axes.set_xlim(*extent[:2])
        figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01).outline.set_visible(False)

    return make_drawing(name, title, caption, alt, min(1 + 0.2 * len(labels), 9), paint)
