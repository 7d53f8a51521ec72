"""The evidence of the merge rule `persistence` by round: rho of each client, and who left a block on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fed.reports.charts import (
    MAX_LABELS,
    MAX_PANELS,
    MAX_SINGLE_CLIENTS,
    Drawing,
    line_colour,
    line_dashes,
    make_drawing,
    panel_grid,
    scaled,
    set_round_axis,
)
from grpo_fed.reports.formatting import format_count, format_names
from grpo_fed.runs.colours import INK, MUTED, PAPER
from grpo_fed.runs.history import GroupMove, History
from grpo_fed.runs.metrics import RHO_LIMIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOWEST, HIGH = -0.5, 1.05
"""The widest range of rho that is shown; by chance it may be far below 0, which says no more than 0 does."""
MAX_BANDS = 3
"""How many entries have bands of their own, where clients are too many for lines."""
MAX_NAMED = 2
"""How many rounds of departures have the clients' names beside their marks; more would cover the lines."""
NAME_GAP = 0.11
"""Distance in rho between two names."""


@dataclass(frozen=True)
class _Kinds:
    """What has a colour of its own: clients if they are few, else the scenario's entries, else nothing."""

    labels: tuple[str, ...]
    """[N]: names of the colours; empty if all clients have the same."""
    of_client: tuple[int, ...]
    """[K]: the colour of each client."""


def draw_evidence(history: History) -> Drawing | None:
    """Draw rho of each client by round, the value above which a client may leave, and who left or returned.

    Each block has a panel with the greatest rho of its groups. None with other rules, and while nothing is compared.
    """
    rho = {block: history.client_series(f"rho/{block}") for block in history.compared}
    rho = {block: values for block, values in rho.items() if np.isfinite(values).any()}
    if not rho:
        return None
    highest = sorted(rho, key=lambda block: -np.nanmax(rho[block]))[:MAX_PANELS]
    shown = [block for block in rho if block in highest]
    rows, columns = panel_grid(len(shown))
    kinds = _find_kinds(history)
    limits = history.server_series(RHO_LIMIT)
    limit = float(limits[np.isfinite(limits)][-1]) if np.isfinite(limits).any() else None
    low = max(LOWEST, min(-0.1, *(float(np.nanmin(rho[block])) - 0.05 for block in shown)))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for index, (axes, block) in enumerate(zip(panels, shown, strict=False)):
            axes.set_ylim(low, HIGH)
            _paint_block(axes, history, block, rho[block], kinds)
            if limit is not None:
                axes.axhline(limit, color=MUTED, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1.5)
            ticks = [0, *([] if limit is None else [limit]), 1]
            axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            axes.set_title(block)
            set_round_axis(axes, history.rounds, label=index >= len(shown) - columns)
            if index % columns == 0:
                axes.set_ylabel("rho")
        for axes in panels[len(shown) :]:
            axes.remove()
        _paint_legend(figure, kinds)

    caption = " ".join(_caption(history, shown, len(rho), limit))
    height = max(2.9, 2.1 * rows) + (0.3 if kinds.labels else 0)
    alt = _describe_moves(history)
    return make_drawing("evidence", "Evidence for departures, by round", caption, alt, height, paint)


def _caption(history: History, shown: Sequence[str], blocks: int, limit: float | None) -> Iterator[str]:
    """Say how to read the panels."""
    yield "rho: how much a client's deviation from the others repeats from round to round, 0 by chance, 1 if always."
    if len(history.block_of_group) > blocks:
        yield "Shown is the greatest of the block's groups."
    if len(history.clients) > MAX_SINGLE_CLIENTS:
        yield "Bands: the middle 90 % and 50 % of the clients that are compared; lines: their medians."
    if limit is not None:
        yield f"Above {limit:g} a client leaves if it also opposes the others."
    moves = [move for move in history.moves if _block_of(history, move) in shown]
    if any(move.left for move in moves):
        yield "Filled mark: it leaves."
    if any(not move.left for move in moves):
        yield "Open mark: it returns."
    if blocks > len(shown):
        yield f"Shown are the {len(shown)} of {blocks} blocks with the highest rho."


def _find_kinds(history: History) -> _Kinds:
    """Choose what has a colour of its own, as in the figure of returns."""
    entries = list(dict.fromkeys(history.entries))
    count = len(history.clients)
    if count <= MAX_LABELS and len(entries) in (1, count):
        return _Kinds(history.clients, tuple(range(count)))
    if 1 < len(entries) <= (MAX_LABELS if count <= MAX_SINGLE_CLIENTS else MAX_BANDS):
        sizes = [history.entries.count(entry) for entry in entries]
        labels = [name if size == 1 else f"{name} ({size:,})" for name, size in zip(entries, sizes, strict=True)]
        return _Kinds(tuple(labels), tuple(entries.index(entry) for entry in history.entries))
    return _Kinds((), (0,) * count)


def _paint_block(axes: Axes, history: History, block: str, rho: np.ndarray, kinds: _Kinds) -> None:
    """Paint the clients' rho [R, K] in one block as lines or bands, and marks of those who left or returned."""
    rounds = history.rounds
    if len(history.clients) > MAX_SINGLE_CLIENTS:
        _paint_bands(axes, rounds, rho, kinds)
    else:
        alpha = 1.0 if len(history.clients) <= MAX_LABELS else 0.5
        for k, kind in enumerate(kinds.of_client):
            style: dict[str, Any] = {"color": line_colour(kind), "linestyle": line_dashes(kind)}
            style |= {"alpha": alpha, "linewidth": 1.3}
            axes.plot(rounds, rho[:, k], **style)  # NaN breaks the line where evidence begins again
            single = _is_single(rho[:, k])
            axes.plot(rounds[single], rho[single, k], "_", color=line_colour(kind), markersize=6, alpha=alpha)
    _paint_moves(axes, history, block, rho, kinds)


def _is_single(values: np.ndarray) -> np.ndarray:
    """Mark the values [R] between unknown ones, of which a line shows nothing, [R] bool."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    single: np.ndarray = known[1:-1] & ~known[:-2] & ~known[2:]
    return single


def _paint_bands(axes: Axes, rounds: np.ndarray, rho: np.ndarray, kinds: _Kinds) -> None:
    """Paint quantiles of many clients' rho [R, K], for each kind."""
    for kind in sorted(set(kinds.of_client)):
        values = rho[:, [of_client == kind for of_client in kinds.of_client]]
        known = np.isfinite(values).any(axis=1)
        quantiles = np.full((5, len(rounds)), np.nan)
        quantiles[:, known] = np.nanquantile(values[known], [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
        lowest, low, median, high, highest = quantiles
        axes.fill_between(rounds, lowest, highest, color=line_colour(kind), alpha=0.18, linewidth=0)
        axes.fill_between(rounds, low, high, color=line_colour(kind), alpha=0.28, linewidth=0)
        axes.plot(rounds, median, color=line_colour(kind), linewidth=1.3)


def _paint_moves(axes: Axes, history: History, block: str, rho: np.ndarray, kinds: _Kinds) -> None:
    """Mark where clients left the block, at their rho, and where they returned, at the lower edge."""
    left: dict[int, dict[int, float]] = {}  # round -> client -> rho
    for move in history.moves:
        if _block_of(history, move) == block and move.left:
            clients = left.setdefault(move.round, {})
            clients[move.client] = max(move.evidence, clients.get(move.client, move.evidence))
    returned = {(m.round, m.client) for m in history.moves if not m.left and _block_of(history, m) == block}
    few = len(history.clients) <= MAX_SINGLE_CLIENTS
    size, alpha = (6.5, 1.0) if few else (4, 0.6)
    filled: dict[str, Any] = {"markersize": size, "alpha": alpha, "zorder": 5, "markeredgewidth": 0.8}
    filled["markeredgecolor"] = PAPER if few else "none"
    for round, clients in left.items():
        for client, value in clients.items():
            axes.plot(round, min(value, HIGH), "o", color=line_colour(kinds.of_client[client]), **filled)
    hollow: dict[str, Any] = {"markersize": size, "markerfacecolor": PAPER, "zorder": 5, "clip_on": False}
    for round, client in returned:
        axes.plot(round, axes.get_ylim()[0], "o", color=line_colour(kinds.of_client[client]), **hollow)
    if few and len(left) <= MAX_NAMED:
        _name_departures(axes, history, left, kinds)


def _name_departures(axes: Axes, history: History, left: dict[int, dict[int, float]], kinds: _Kinds) -> None:
    """Write the names of clients beside the marks of the rounds in which they left; left: round -> client -> rho."""
    if kinds.labels == history.clients:
        return  # the legend names them
    heights: list[float] = []
    last = history.rounds[-1]
    for round, clients in left.items():
        height = float(np.mean([min(value, HIGH) for value in clients.values()]))
        while any(abs(height - other) < NAME_GAP - 1e-9 for other in heights):
            height -= NAME_GAP
        heights.append(height)
        names = format_names([history.clients[client] for client in clients], 2)
        colours = {kinds.of_client[client] for client in clients}
        right = round - history.rounds[0] > 0.6 * (last - history.rounds[0])
        axes.annotate(
            names,
            (round, height),
            (-6 if right else 6, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            size=scaled(8),
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            zorder=4,
            color=line_colour(colours.pop()) if len(colours) == 1 and kinds.labels else INK,
        )


def _paint_legend(figure: Figure, kinds: _Kinds) -> None:
    """Name the colours below the panels."""
    from matplotlib.lines import Line2D

    if kinds.labels:
        handles = [
            Line2D([], [], color=line_colour(kind), linestyle=line_dashes(kind), linewidth=2)
            for kind in range(len(kinds.labels))
        ]
        figure.legend(
            handles,
            kinds.labels,
            loc="outside lower center",
            ncols=min(len(kinds.labels), 5),
            frameon=False,
            fontsize=scaled(9),
            handlelength=1.6,
        )


def _block_of(history: History, move: GroupMove) -> str:
    """Find the block of the group that a client left or returned to."""
    return history.block_of_group.get(move.group, move.group)


def _describe_moves(history: History) -> str:
    """Say who left which block in which round on which rho."""
    left: dict[tuple[int, str], dict[int, float]] = {}
    for move in history.moves:
        if move.left:
            clients = left.setdefault((move.round, _block_of(history, move)), {})
            clients[move.client] = max(move.evidence, clients.get(move.client, move.evidence))
    if not left:
        return f"rho of {format_count(len(history.clients), 'client')} by round; no client has left a group."
    parts = []
    for (round, block), clients in left.items():
        who = format_names([history.clients[client] for client in clients], 4)
        low, high = f"{min(clients.values()):.2f}", f"{max(clients.values()):.2f}"
        parts.append(f"{who} left {block} in round {round} with rho {low if low == high else f'{low} to {high}'}")
    more = f"; and {len(parts) - 6} more departures" if len(parts) > 6 else ""
    return f"rho of {format_count(len(history.clients), 'client')} by round: {'; '.join(parts[:6])}{more}."
