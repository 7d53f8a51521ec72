"""How far the shared blocks went: KL against its budget, and the part of the step that was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fed.reports.charts import (
    NAMED,
    PANELS,
    Drawing,
    by_round,
    colour_of,
    dash_of,
    drawing,
    grid_of,
    label_end,
    marks,
)
from grpo_fed.reports.tables import many, some
from grpo_fed.runs.colours import INK, MUTED
from grpo_fed.runs.history import History, fill_forward

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def kl(history: History) -> Drawing | None:
    """KL of the server's step, measured or predicted, against the budget of each block and of all together."""
    names = [name for name in ("joint", *history.blocks) if np.isfinite(history.server_series(f"kl/{name}")).any()]
    if not names:
        return None
    if len(names) > PANELS:
        return _kl_map(history, names)
    rows, columns = grid_of(len(names))
    source = "predicted by a Fisher matrix" if history.scenario.proximity.mode == "quadratic" else "measured"
    has_budget = any(np.isfinite(history.server_series(f"budget/{name}")).any() for name in names)
    held = [name for name in names if _is_held(history, name)]
    caption = f"Line: KL of the step that was made, {source}, by the clients' {history.scenario.proximity.over}."
    caption += " Dashes: the budget." if has_budget else " There is no budget."
    if held:
        caption += " Triangles: the whole step would have gone beyond it."
    look_back = [name for name in names if np.isfinite(_looked_back(history, name)).any()]
    if look_back:
        caption += " Crosses: as clients measured it later."

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, (one, name) in enumerate(zip(axes, names, strict=False)):
            _budget(one, history, name)
            one.set_title("all together" if name == "joint" else name)
            by_round(one, history.rounds, label=place >= len(names) - columns)
            if place % columns == 0:
                one.set_ylabel("KL")
        for one in axes[len(names) :]:
            one.remove()

    told = [_budget_told(history, name) for name in names]
    alt = f"KL of each round's step against its budget: {'; '.join(told)}."
    return drawing("kl", "KL of the step against its budget", caption, alt, max(2.6, 1.95 * rows), paint)


def _is_held(history: History, name: str) -> bool:
    wanted, budget = history.server_series(f"wanted/{name}"), history.server_series(f"budget/{name}")
    return bool((wanted > budget).any())


def _looked_back(history: History, name: str) -> np.ndarray:
    """[R]: the KL of a round's step as the next round's clients found it."""
    return np.append(history.server_series(f"last_kl/{name}")[1:], np.nan)


def _budget(axes: Axes, history: History, name: str) -> None:
    """One block's KL and budget by round."""
    rounds = history.rounds
    found, budget = history.server_series(f"kl/{name}"), fill_forward(history.server_series(f"budget/{name}"))
    wanted, later = history.server_series(f"wanted/{name}"), _looked_back(history, name)
    held = wanted > budget
    seen = np.isfinite(found)
    axes.plot(rounds[seen], found[seen], color=colour_of(0), **marks(len(rounds)))
    axes.fill_between(rounds[seen], 0, found[seen], color=colour_of(0), alpha=0.15, linewidth=0)
    top = float(np.nanmax([np.nanmax(found), *budget, *later])) * 1.25 or 1e-6
    if np.isfinite(budget).any():
        ends = np.array([rounds[0] - 0.5, *rounds[1:], rounds[-1] + 0.5])  # seen in a run of one round too
        axes.plot(ends, np.append(budget, budget[-1]), color=colour_of(1), linestyle=(0, (4, 2)), linewidth=1.4)
    if held.any():
        # beyond the top it is known to be more, and how much more would only press what matters flat
        axes.plot(rounds[held], np.minimum(wanted[held], top), "^", color=MUTED, alpha=0.6, markersize=3.5)
    if np.isfinite(later).any():
        axes.plot(rounds, later, "x", color=INK, markersize=4)
    axes.set_ylim(0, top * 1.02)


def _budget_told(history: History, name: str) -> str:
    found, budget = history.server_series(f"kl/{name}"), history.server_series(f"budget/{name}")
    most = f"{'all together' if name == 'joint' else name} at most {np.nanmax(found):.2g}"
    if not np.isfinite(budget).any():
        return f"{most}, no budget"
    return f"{most} of {np.nanmax(budget):.2g}"


def _kl_map(history: History, names: Sequence[str]) -> Drawing | None:
    """The part of its budget that each of many blocks used."""
    used = np.stack([history.server_series(f"kl/{name}") / history.server_series(f"budget/{name}") for name in names])
    if not np.isfinite(used).any():
        return None
    caption = "The part of its KL budget that each block used, and all together."
    alt = (
        f"The part of its KL budget used by round, for {many(len(names) - 1, 'block')}: at most {np.nanmax(used):.2f}."
    )
    labels = ["all together" if name == "joint" else name for name in names]
    return _heat("kl", "KL of the step as part of its budget", caption, alt, history, labels, used)


def steps(history: History) -> Drawing | None:
    """Alpha of each block by round: how much of the merge's step was made."""
    alphas = (
        np.stack([history.server_series(f"alpha/{block}") for block in history.blocks])
        if history.blocks
        else np.zeros(0)
    )
    if not np.isfinite(alphas).any() or history.scenario.proximity.mode == "off":
        return None
    caption = "1 is all of the way to where the merge wants a block to go, 0 none of it."
    told = [f"{block} {np.nanmean(row):.2f}" for block, row in zip(history.blocks, alphas, strict=True)]
    alt = f"Part of the step that was made, mean over the rounds: {', '.join(told)}."
    if len(history.blocks) > NAMED:
        return _heat("steps", "Part of the step that was made", caption, alt, history, history.blocks, alphas)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (blocks, row) in enumerate(_alike(history.blocks, alphas)):
            seen = np.isfinite(row)
            if seen.any():
                style = {"color": colour_of(place), "linestyle": dash_of(place)}
                axes.plot(history.rounds[seen], row[seen], **style, **marks(len(row)), clip_on=False)
                whole = len(blocks) == len(history.blocks) > 1
                label_end(axes, row[seen][-1], "all blocks" if whole else some(blocks, 2), colour_of(place))
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("alpha")
        by_round(axes, history.rounds)

    return drawing("steps", "Part of the step that was made", caption, alt, 2.6, paint)


def _alike(blocks: Sequence[str], rows: np.ndarray) -> list[tuple[list[str], np.ndarray]]:
    """Blocks whose rows of [B, R] are the same stand together: of lines upon each other only the last is seen."""
    found: dict[bytes, tuple[list[str], np.ndarray]] = {}
    for block, row in zip(blocks, rows, strict=True):
        found.setdefault(np.nan_to_num(row, nan=-1.0).tobytes(), ([], row))[0].append(block)
    return list(found.values())


def _heat(
    name: str, title: str, caption: str, alt: str, history: History, labels: Sequence[str], values: np.ndarray
) -> Drawing:
    """[B, R] from 0 to 1 as cells, a row for each block."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        rounds = history.rounds
        extent = (rounds[0] - 0.5, rounds[-1] + 0.5, len(labels) - 0.5, -0.5)
        shown: Any = axes.imshow(
            values, cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest"
        )
        axes.grid(False)
        every = -(-len(labels) // 40)
        axes.set_yticks(np.arange(0, len(labels), every), labels=labels[::every])
        axes.tick_params(axis="y", length=0, labelsize=8)
        by_round(axes, rounds)
        axes.set_xlim(*extent[:2])
        figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.01).outline.set_visible(False)

    return drawing(name, title, caption, alt, min(1 + 0.2 * len(labels), 9), paint)
