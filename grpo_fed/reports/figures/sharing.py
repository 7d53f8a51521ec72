"""What clients share: who has left which group of the shared blocks, and who shares a block with whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import PANELS, PERSONAL, SHARED, THIN, Drawing, by_round, drawing, grid_of
from grpo_fed.reports.tables import many, some
from grpo_fed.runs.colours import MUTED, PAPER
from grpo_fed.runs.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK = "#101418"
"""Of marks on a map: its cells are light on dark paper too, so that our ink would not do."""
KINDS = (SHARED, PERSONAL, "#7bc8a4", "#e3b3d0", "#f0d58a", "#8a8fd6", "#b0b7bf", "#5a6570")
"""Of clusters: as many as `merge.most` allows if nobody changes it."""


def groups(history: History) -> Drawing | None:
    """Who has left which group of the shared blocks, by round, and who had no answer; None where there is neither.

    A panel for each group, or where they are many for each block.
    """
    if not history.departed.any() and not history.failed.any():
        return None
    names, shares = _shares(history)
    order = _order(history, shares)
    shown = sorted(sorted(range(len(names)), key=lambda g: -shares[..., g].mean())[:PANELS])
    rows, columns = grid_of(len(shown), 4 if len(history.clients) > THIN else 3)
    by_block = len(history.block_of_group) > PANELS and bool(history.departed.any())
    caption = "Blue: the client shares it. Orange: it has left and keeps its own."
    caption += " Between: it has left some of the block's groups." if by_block else ""
    caption += _absence(history)
    if not _few(history):
        caption += " Clients in the order of how much they keep to themselves."
    if len(shown) < len(names):
        caption += f" The {len(shown)} of {len(names)} that most clients left."

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, (one, g) in enumerate(zip(axes, shown, strict=False)):
            _map(one, history, _mixed(shares[:, order, g]), order, place % columns == 0)
            by_round(one, history.rounds, label=place >= len(shown) - columns)
            inside = many(list(history.block_of_group.values()).count(names[g]), "group")
            one.set_title(f"{names[g]} ({inside})" if by_block else names[g], size=9.5)
        for one in axes[len(shown) :]:
            one.remove()

    told, height = _groups_told(history), _tall(history, rows)
    return drawing("groups", "Shared or personal, by round", caption, told, height, paint)


def clusters(history: History) -> Drawing | None:
    """Who shares which block with whom, by round: a panel for each block; None where the merge makes no clusters."""
    members, blocks = history.clusters, history.clustered[:PANELS]
    if not blocks:
        return None
    rows, columns = grid_of(len(blocks), 4 if len(history.clients) > THIN else 3)
    few = _few(history)
    order = np.arange(len(history.clients)) if few else np.lexsort(members[-1].T)
    caption = "Clients of one colour share the block with each other, in each round; blue are those of most weight."
    caption += " At the right the number of the cluster." if few else " Clients in the order of their last clusters."
    caption += f" Colours come again after {len(KINDS)} clusters." if np.nanmax(members) >= len(KINDS) else ""
    caption += _absence(history)
    if len(blocks) < len(history.clustered):
        caption += f" The first {len(blocks)} of {len(history.clustered)} blocks."

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, (one, block) in enumerate(zip(axes, blocks, strict=False)):
            own = members[:, order, place]
            _map(one, history, _kinds(own), order, place % columns == 0)
            by_round(one, history.rounds, label=place >= len(blocks) - columns)
            one.set_title(block, size=9.5)
            if few:
                _number_rows(one, own[-1])
        for one in axes[len(blocks) :]:
            one.remove()

    told, height = _clusters_told(history), _tall(history, rows)
    return drawing("clusters", "Who shares a block with whom, by round", caption, told, height, paint)


def _kinds(members: np.ndarray) -> np.ndarray:
    """[R, K] numbers of clusters -> colours [K, R, 3]; paper where there is none."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(colour) for colour in (*KINDS, PAPER)])
    known = np.isfinite(members)
    place = np.where(known, np.nan_to_num(members) % len(KINDS), len(KINDS)).astype(int)
    chosen: np.ndarray = colours[place.T]
    return chosen


def _number_rows(axes: Axes, numbers: np.ndarray) -> None:
    """At their right ends; colour is never all that tells two apart."""
    for row in np.flatnonzero(np.isfinite(numbers)):
        at, text = (1.0, float(row)), f"{numbers[row]:.0f}"
        axes.annotate(text, at, (3, 0), ("axes fraction", "data"), "offset points", va="center", size=8)


def _clusters_told(history: History) -> str:
    told = []
    for place, block in enumerate(history.clustered):
        last = history.clusters[-1, :, place]
        kinds = np.unique(last[np.isfinite(last)])
        if len(kinds) < 2:
            told.append(f"all {'of the latest merge ' if np.isnan(last).any() else ''}share {block}")
            continue
        apart = [[history.clients[k] for k in np.flatnonzero(last == kind)] for kind in kinds[1:]]
        names = "; ".join(some(group, 4) for group in apart)
        told.append(f"{block} is shared in {len(kinds)} clusters, apart from most {names}")
    return f"At the end {', '.join(told)}."


def _few(history: History) -> bool:
    return len(history.clients) <= THIN


def _tall(history: History, rows: int) -> float:
    """Inches of so many rows of maps."""
    height = rows * (0.55 + (0.2 * len(history.clients) + 0.25 if _few(history) else 2.4))
    return min(max(height, 1.5), 11)


def _absence(history: History) -> str:
    """How to read that somebody was not there."""
    text = ""
    if history.failed.any():
        text += " x: no answer." if _few(history) else " Grey: no answer."
    if _few(history) and (~history.trained & ~history.failed).any():
        text += " Dot: it was not drawn."
    return text


def _shares(history: History) -> tuple[list[str], np.ndarray]:
    """What has a panel, groups or if they are many blocks; and how much of each a client has left, [R, K, panels]."""
    if not history.departed.any():
        return ["all that is shared"], np.zeros((*history.departed.shape[:2], 1))
    if len(history.block_of_group) <= PANELS:
        return list(history.block_of_group), history.departed.astype(float)
    blocks = list(dict.fromkeys(history.block_of_group.values()))
    member = np.array([[home == block for block in blocks] for home in history.block_of_group.values()], float)
    return blocks, history.departed @ (member / member.sum(axis=0))


def _order(history: History, shares: np.ndarray) -> np.ndarray:
    """The scenario's, or where names would not be read anyway, who has left most last."""
    if _few(history):
        return np.arange(len(history.clients))
    weight = shares.mean(axis=2)
    return np.lexsort((weight.mean(axis=0), weight[-1]))


def _mixed(shares: np.ndarray) -> np.ndarray:
    """[R, K] from shared to personal -> colours [K, R, 3]."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("share", [SHARED, PERSONAL])
    colours: np.ndarray = scale(shares.T)[..., :3]
    return colours


def _map(axes: Axes, history: History, cells: np.ndarray, order: np.ndarray, names: bool) -> None:
    """Colours [K, R, 3] as cells, a row for each client."""
    from matplotlib.colors import to_rgb

    few, clients, rounds = _few(history), len(order), history.rounds
    failed = history.failed[:, order].T
    if not few:
        cells[failed] = to_rgb(MUTED)
    extent = (rounds[0] - 0.5, rounds[-1] + 0.5, clients - 0.5, -0.5)
    axes.imshow(cells, aspect="auto", interpolation="nearest" if few else "antialiased", extent=extent)
    axes.set_xlim(*extent[:2])
    axes.grid(False)
    if not few:
        axes.set_yticks([])
        if names:
            axes.set_ylabel(f"{clients:,} clients")
        return
    size = 4.5 if len(rounds) <= 30 else 2.5
    for marker, which in (("x", failed), (".", ~failed & ~history.trained[:, order].T)):
        rows, columns = np.nonzero(which)
        axes.plot(rounds[columns], rows, marker, color=DARK, markersize=size if marker == "x" else 2, linestyle="")
    axes.set_yticks(np.arange(clients), labels=[history.clients[k] for k in order] if names else [""] * clients)
    axes.tick_params(axis="y", length=0, labelsize=9 if clients <= 16 else 8)
    if len(rounds) <= 60:
        axes.hlines(np.arange(clients - 1) + 0.5, *extent[:2], color="#ffffff", linewidth=0.8)


def _groups_told(history: History) -> str:
    left = {name: groups for name, groups in history.personal.items() if groups}
    if not left:
        return "Every client shares every group of the shared blocks at the end."
    told = [f"{name} has left {', '.join(own[:4])}{' and more' if len(own) > 4 else ''}" for name, own in left.items()]
    more = f"; and {len(told) - 6} more" if len(told) > 6 else ""
    clients = many(len(history.clients), "client")
    return f"At the end {len(left)} of {clients} keep groups of their own: {'; '.join(told[:6])}{more}."
