"""Maps of what clients share, by round: departures from groups of the shared blocks, and clusters of clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import (
    DEPARTED_COLOUR,
    MAX_PANELS,
    MAX_SINGLE_CLIENTS,
    SHARED_COLOUR,
    Drawing,
    make_drawing,
    panel_grid,
    scaled,
    set_round_axis,
)
from grpo_fed.reports.formatting import format_count, format_names
from grpo_fed.runs.colours import MUTED, PAPER
from grpo_fed.runs.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARK_COLOUR = "#101418"
"""Colour of marks on a map. A page does not replace it on dark paper, since a map's cells are light there too."""
CLUSTER_COLOURS = (SHARED_COLOUR, DEPARTED_COLOUR, "#7bc8a4", "#e3b3d0", "#f0d58a", "#8a8fd6", "#b0b7bf", "#5a6570")
"""Colours of clusters, as many as the default of `merge.most` allows."""


def draw_groups(history: History) -> Drawing | None:
    """Draw which client has departed from which group of the shared blocks, and which client did not answer.

    Each group has a panel, or each block if there are many groups. None without a departure and without a missing
    answer.
    """
    if not history.departed.any() and not history.failed.any():
        return None
    names, shares = _departed_shares(history, history.departed)
    order = _client_order(history, shares)
    most_departed = sorted(range(len(names)), key=lambda panel: -shares[..., panel].mean())
    shown = sorted(most_departed[:MAX_PANELS])
    rows, columns = panel_grid(len(shown), 3 if _has_named_rows(history) else 4)
    by_block = len(history.block_of_group) > MAX_PANELS and bool(history.departed.any())
    caption = "Blue: the client shares the group. Orange: it has departed and keeps its own values."
    caption += " In between: it has departed from some of the block's groups." if by_block else ""
    caption += _missing_caption(history)
    if not _has_named_rows(history):
        caption += " Clients are sorted by how many groups they have departed from."
    if len(shown) < len(names):
        caption += f" Shown are the {len(shown)} of {len(names)} with the most departures."

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, panel) in enumerate(zip(panels, shown, strict=False)):
            _paint_map(axes, history, _share_colours(shares[:, order, panel]), order, index % columns == 0)
            set_round_axis(axes, history.rounds, label=index >= len(shown) - columns)
            count = format_count(list(history.block_of_group.values()).count(names[panel]), "group")
            axes.set_title(f"{names[panel]} ({count})" if by_block else names[panel], size=scaled(9.5))
        for axes in panels[len(shown) :]:
            axes.remove()

    title, alt = "Departures from shared groups, by round", _describe_departures(history)
    return make_drawing("groups", title, caption, alt, _map_height(history, rows), paint)


def draw_clusters(history: History) -> Drawing | None:
    """Draw the cluster of each client, with a panel for each block; None where the merge makes no clusters."""
    clusters, blocks = history.clusters, history.clustered[:MAX_PANELS]
    if not blocks:
        return None
    named_rows = _has_named_rows(history)
    rows, columns = panel_grid(len(blocks), 3 if named_rows else 4)
    order = np.arange(len(history.clients)) if named_rows else np.lexsort(clusters[-1].T)
    caption = "In each round clients of one colour share the block; blue is the cluster with the most weight."
    caption += " At the right: the last cluster's number." if named_rows else " Clients are sorted by last cluster."
    if np.nanmax(clusters) >= len(CLUSTER_COLOURS):
        caption += f" Colours repeat after {len(CLUSTER_COLOURS)} clusters."
    caption += _missing_caption(history)
    if len(blocks) < len(history.clustered):
        caption += f" Shown are the first {len(blocks)} of {len(history.clustered)} blocks."

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, block) in enumerate(zip(panels, blocks, strict=False)):
            cluster_of_client = clusters[:, order, index]
            _paint_map(axes, history, _cluster_colours(cluster_of_client), order, index % columns == 0)
            set_round_axis(axes, history.rounds, label=index >= len(blocks) - columns)
            axes.set_title(block, size=scaled(9.5))
            if named_rows:
                _number_rows(axes, cluster_of_client[-1])
        for axes in panels[len(blocks) :]:
            axes.remove()

    title, alt = "Clusters of clients in each block, by round", _describe_clusters(history)
    return make_drawing("clusters", title, caption, alt, _map_height(history, rows), paint)


def draw_sites(history: History) -> Drawing | None:
    """Draw which site has departed from which group of the shared blocks; None without sites, or if none has."""
    if not history.site_departed.any():
        return None
    names, shares = _departed_shares(history, history.site_departed)
    most_departed = sorted(range(len(names)), key=lambda panel: -shares[..., panel].mean())
    shown = sorted(most_departed[:MAX_PANELS])
    rows, columns = panel_grid(len(shown), 3)
    sites = list(history.sites)
    caption = "Blue: the site shares it with the others. Orange: it has departed, and its clients share its own."

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, panel) in enumerate(zip(panels, shown, strict=False)):
            _paint_cells(axes, history, _share_colours(shares[..., panel]), "nearest")
            axes.set_yticks(np.arange(len(sites)), labels=sites if index % columns == 0 else [""] * len(sites))
            axes.tick_params(axis="y", length=0, labelsize=scaled(9))
            set_round_axis(axes, history.rounds, label=index >= len(shown) - columns)
            axes.set_title(names[panel], size=scaled(9.5))
        for axes in panels[len(shown) :]:
            axes.remove()

    left = {name: groups for name, groups in history.site_personal.items() if groups}
    parts = "; ".join(f"{name} from {format_names(groups, 4)}" for name, groups in left.items())
    alt = f"At the end departed: {parts}." if parts else "At the end every site shares every group."
    height = min(max(rows * (0.8 + 0.2 * len(sites)), 1.5), 11)
    return make_drawing("sites", "Departures of sites, by round", caption, alt, height, paint)


# Departures -----------------------------------------------------------------------------------------------------------


def _departed_shares(history: History, departed: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Choose what has a panel, and compute the share of its groups that each client or site has departed from.

    The panels are the groups, or if there are many the blocks; the shares are [R, K, panels].
    """
    if not departed.any():
        return ["all shared blocks"], np.zeros((*departed.shape[:2], 1))
    if len(history.block_of_group) <= MAX_PANELS:
        return list(history.block_of_group), departed.astype(float)
    blocks = list(dict.fromkeys(history.block_of_group.values()))
    is_in = np.array([[home == block for block in blocks] for home in history.block_of_group.values()], float)
    return blocks, departed @ (is_in / is_in.sum(axis=0))


def _client_order(history: History, shares: np.ndarray) -> np.ndarray:
    """Order clients as the scenario does, or in a map without names by their departures, the most last."""
    if _has_named_rows(history):
        return np.arange(len(history.clients))
    departed = shares.mean(axis=2)
    return np.lexsort((departed.mean(axis=0), departed[-1]))


def _share_colours(shares: np.ndarray) -> np.ndarray:
    """Map departed shares [R, K] to colours [K, R, 3]."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("share", [SHARED_COLOUR, DEPARTED_COLOUR])
    colours: np.ndarray = scale(shares.T)[..., :3]
    return colours


def _describe_departures(history: History) -> str:
    """Say which clients have departed from which groups at the end."""
    departed = {name: groups for name, groups in history.personal.items() if groups}
    if not departed:
        return "At the end every client shares every group of the shared blocks."
    parts = [
        f"{name} from {', '.join(groups[:4])}{' and more' if len(groups) > 4 else ''}"
        for name, groups in departed.items()
    ]
    more = f"; and {len(parts) - 6} more" if len(parts) > 6 else ""
    clients = format_count(len(history.clients), "client")
    verb = "has" if len(departed) == 1 else "have"
    return f"At the end {len(departed)} of {clients} {verb} departed from groups: {'; '.join(parts[:6])}{more}."


# Clusters -------------------------------------------------------------------------------------------------------------


def _cluster_colours(clusters: np.ndarray) -> np.ndarray:
    """Map numbers of clusters [R, K] to colours [K, R, 3]; a client without a cluster has the paper's colour."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(colour) for colour in (*CLUSTER_COLOURS, PAPER)])
    known = np.isfinite(clusters)
    index = np.where(known, np.nan_to_num(clusters) % len(CLUSTER_COLOURS), len(CLUSTER_COLOURS)).astype(int)
    chosen: np.ndarray = colours[index.T]
    return chosen


def _number_rows(axes: Axes, clusters: np.ndarray) -> None:
    """Write each client's cluster [K] at the right end of its row, so that colour alone never tells two apart."""
    for row in np.flatnonzero(np.isfinite(clusters)):
        position, text = (1.0, float(row)), f"{clusters[row]:.0f}"
        axes.annotate(text, position, (3, 0), ("axes fraction", "data"), "offset points", va="center", size=scaled(8))


def _describe_clusters(history: History) -> str:
    """Say which clients share each block at the end."""
    parts = []
    for index, block in enumerate(history.clustered):
        last = history.clusters[-1, :, index]
        numbers = np.unique(last[np.isfinite(last)])
        if len(numbers) < 2:
            clients = "all clients of the latest merge" if np.isnan(last).any() else "all clients"
            parts.append(f"{clients} share {block}")
            continue
        others = [[history.clients[k] for k in np.flatnonzero(last == number)] for number in numbers[1:]]
        names = "; ".join(format_names(members, 4) for members in others)
        parts.append(f"{block} is shared in {len(numbers)} clusters, the main one and {names}")
    return f"At the end {', '.join(parts)}."


# Maps -----------------------------------------------------------------------------------------------------------------


def _has_named_rows(history: History) -> bool:
    """Decide whether the clients are few enough that every row of a map has a name."""
    return len(history.clients) <= MAX_SINGLE_CLIENTS


def _map_height(history: History, rows: int) -> float:
    """Compute the inches of a number of rows of maps."""
    height = rows * (0.55 + (0.2 * len(history.clients) + 0.25 if _has_named_rows(history) else 2.4))
    return min(max(height, 1.5), 11)


def _missing_caption(history: History) -> str:
    """Say how to read the marks of clients that did not answer or were not sampled."""
    text = ""
    if history.failed.any():
        text += " x: no answer." if _has_named_rows(history) else " Grey: no answer."
    if _has_named_rows(history) and (~history.trained & ~history.failed).any():
        text += " Dot: the client was not sampled."
    return text


def _paint_map(axes: Axes, history: History, cells: np.ndarray, order: np.ndarray, names: bool) -> None:
    """Paint colours [K, R, 3] as cells, with a row for each client and marks where a client did not take part.

    order: [K], the clients of the rows. names: whether rows have names beside them.
    """
    from matplotlib.colors import to_rgb

    named_rows, clients, rounds = _has_named_rows(history), len(order), history.rounds
    failed = history.failed[:, order].T
    if not named_rows:
        cells[failed] = to_rgb(MUTED)
    _paint_cells(axes, history, cells, "nearest" if named_rows else "antialiased")
    if not named_rows:
        axes.set_yticks([])
        if names:
            axes.set_ylabel(f"{clients:,} clients")
        return
    cross_size = 4.5 if len(rounds) <= 30 else 2.5
    for marker, size, marked in (("x", cross_size, failed), (".", 2, ~failed & ~history.trained[:, order].T)):
        rows, columns = np.nonzero(marked)
        axes.plot(rounds[columns], rows, marker, color=MARK_COLOUR, markersize=size, linestyle="")
    axes.set_yticks(np.arange(clients), labels=[history.clients[k] for k in order] if names else [""] * clients)
    axes.tick_params(axis="y", length=0, labelsize=scaled(9 if clients <= 16 else 8))
    if len(rounds) <= 60:
        axes.hlines(np.arange(clients - 1) + 0.5, rounds[0] - 0.5, rounds[-1] + 0.5, color="#ffffff", linewidth=0.8)


def _paint_cells(axes: Axes, history: History, cells: np.ndarray, interpolation: str) -> None:
    """Paint colours [K, R, 3] as the cells of a map whose columns are rounds."""
    extent = (history.rounds[0] - 0.5, history.rounds[-1] + 0.5, len(cells) - 0.5, -0.5)
    axes.imshow(cells, aspect="auto", interpolation=interpolation, extent=extent)
    axes.set_xlim(*extent[:2])
    axes.grid(False)
