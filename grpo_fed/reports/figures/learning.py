"""Returns of the clients by round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.axis import x_axis
from grpo_fed.reports.charts import (
    MAX_LABELS,
    MAX_PANELS,
    MAX_SINGLE_CLIENTS,
    Drawing,
    label_line,
    line_colour,
    line_dashes,
    make_drawing,
    marker_style,
    panel_grid,
)
from grpo_fed.reports.formatting import format_count, format_return, short_task
from grpo_fed.runs.colours import INK, MUTED, PAPER
from grpo_fed.runs.history import History
from grpo_fed.runs.metrics import EVALUATION_RETURN
from grpo_fed.runs.statistics import interquartile_mean, stratified_resamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESAMPLES = 1_000
"""Bootstrap resamples of a band."""


def draw_learning(history: History) -> Drawing | None:
    """Draw the return of each client by round, and the interquartile mean with its band.

    Each environment has a panel, since returns of different environments cannot be compared. None if no client has a
    return.
    """
    envs = [env for env in dict.fromkeys(history.envs) if np.isfinite(_returns_in(history, env)).any()]
    if not envs:
        return None
    shown = envs[:MAX_PANELS]
    rows, columns = panel_grid(len(shown))
    axis, with_start = x_axis(history), bool(np.isfinite(history.before).any())

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for index, (axes, env) in enumerate(zip(panels, shown, strict=False)):
            _paint_env(axes, history, env, single=len(shown) == 1)
            axis.place(axes, with_start, label=index >= len(shown) - columns)
            if len(shown) > 1:
                axes.set_title(short_task(env))
            if index % columns == 0:
                axes.set_ylabel("return")
        for axes in panels[len(shown) :]:
            axes.remove()

    latest = _latest_returns(history)
    ends = [f"{short_task(env)}: {_describe_end(latest[np.array(history.envs) == env])}" for env in shown]
    clients, rounds = format_count(len(history.clients), "client"), format_count(len(history.lines), "round")
    alt = f"Return by round of {clients} over {rounds}; {'; '.join(ends)}."
    caption = " ".join(_caption(history, shown, len(envs)))
    return make_drawing("learning", f"Return by {axis.short}", caption, alt, 3.7 if rows == 1 else 2.6 * rows, paint)


def _caption(history: History, shown: Sequence[str], envs: int) -> Iterator[str]:
    """Say how to read the curves."""
    counts = [history.envs.count(env) for env in shown]
    if min(counts) <= MAX_SINGLE_CLIENTS:
        yield "Lines: each client's return in training episodes."
    if max(counts) > MAX_SINGLE_CLIENTS:
        yield "Light bands: the middle 90 % and 50 % of the clients' returns in training episodes."
    if max(counts) > 2:
        yield "Thick line: interquartile mean (IQM) over clients, with its 95 % bootstrap interval."
    if np.isfinite(history.before).any() or np.isfinite(history.after).any():
        yield "Diamonds: evaluations with the likeliest actions."
    if envs > len(shown):
        yield f"Shown are the first {len(shown)} of {envs} environments."


def _returns_in(history: History, env: str) -> np.ndarray:
    """Select the returns of the clients with an environment, [R, k]."""
    return history.returns[:, np.array(history.envs) == env]


def _latest_returns(history: History) -> np.ndarray:
    """Take each client's final return, or its latest training return if it has none, [K]."""
    return np.where(np.isfinite(history.after), history.after, history.returns[-1])


def _describe_end(returns: np.ndarray) -> str:
    """Describe returns [k] in words."""
    known = returns[np.isfinite(returns)]
    if not known.size:
        return "no episode has ended"
    if known.size == 1:
        return f"at the end {format_return(float(known[0]))}"
    mean = "interquartile mean" if known.size > 3 else "mean"
    ends = f"from {format_return(float(known.min()))} to {format_return(float(known.max()))}"
    return f"at the end {mean} {format_return(_iqm(known))}, {ends}"


def _paint_env(axes: Axes, history: History, env: str, single: bool) -> None:
    """Paint the clients of one environment; what has a label depends on how many clients and entries there are.

    single: whether it is the figure's only panel.
    """
    selected = np.flatnonzero(np.array(history.envs) == env)
    paint_clients(axes, history, history.returns, selected)
    _paint_mean(axes, history, selected, single)
    _paint_evaluations(axes, history, selected)


def paint_clients(axes: Axes, history: History, series: np.ndarray, selected: Sequence[int] | np.ndarray) -> None:
    """Paint a number of each selected client by round, with names beside the lines. series: [R, K]."""
    returns, rounds = series[:, selected], x_axis(history).values
    names = [history.clients[k] for k in selected]
    entry_of_client = [history.entries[k] for k in selected]
    entries = list(dict.fromkeys(entry_of_client))
    if len(names) > MAX_SINGLE_CLIENTS:
        _paint_bands(axes, rounds, returns, entry_of_client)
    elif len(names) <= MAX_LABELS and len(entries) in (1, len(names)):
        _paint_lines(axes, rounds, returns, list(range(len(names))), 1.0)
        for k, name in enumerate(names):
            _label(axes, returns[-1, k], name, line_colour(k))
    elif 1 < len(entries) <= MAX_LABELS:
        alpha = 1.0 if len(names) <= MAX_LABELS else 0.45
        _paint_lines(axes, rounds, returns, [entries.index(entry) for entry in entry_of_client], alpha)
        for index, entry in enumerate(entries):
            ends = returns[-1, [entry == client_entry for client_entry in entry_of_client]]
            if np.isfinite(ends).any():
                _label(axes, float(np.nanmean(ends)), _entry_label(entry, entry_of_client), line_colour(index))
    else:
        _paint_lines(axes, rounds, returns, [0] * len(names), 0.4)
        if np.isfinite(returns[-1]).any():
            for k in dict.fromkeys((int(np.nanargmax(returns[-1])), int(np.nanargmin(returns[-1])))):
                _label(axes, returns[-1, k], names[k], line_colour(0))


def _paint_lines(axes: Axes, rounds: np.ndarray, returns: np.ndarray, styles: Sequence[int], alpha: float) -> None:
    """Paint a line for each client in the style with its index; returns: [R, k]."""
    for k, style_index in enumerate(styles):
        known = np.isfinite(returns[:, k])
        style = {"color": line_colour(style_index), "linestyle": line_dashes(style_index)}
        axes.plot(rounds[known], returns[known, k], **style, alpha=alpha, linewidth=1.3, **marker_style(len(rounds)))


def _label(axes: Axes, y: float, text: str, colour: str) -> None:
    if np.isfinite(y):
        label_line(axes, y, text, colour)


def _entry_label(entry: str, entry_of_client: Sequence[str]) -> str:
    count = entry_of_client.count(entry)
    return entry if count == 1 else f"{entry} ({count:,})"


def _paint_bands(axes: Axes, rounds: np.ndarray, returns: np.ndarray, entry_of_client: Sequence[str]) -> None:
    """Paint quantiles of many clients, [R, k]; up to three entries have bands of their own."""
    entries = list(dict.fromkeys(entry_of_client))
    entries = entries if len(entries) <= 3 else [""]
    for index, entry in enumerate(entries):
        values = returns if not entry else returns[:, [entry == client_entry for client_entry in entry_of_client]]
        known = np.isfinite(values).any(axis=1)
        if not known.any():
            continue
        lowest, low, high, highest = np.nanquantile(values[known], [0.05, 0.25, 0.75, 0.95], axis=1)
        axes.fill_between(rounds[known], lowest, highest, color=line_colour(index), alpha=0.18, linewidth=0)
        axes.fill_between(rounds[known], low, high, color=line_colour(index), alpha=0.28, linewidth=0)
        if len(entries) > 1:
            label_line(axes, (low[-1] + high[-1]) / 2, _entry_label(entry, entry_of_client), line_colour(index))


def _paint_mean(axes: Axes, history: History, selected: np.ndarray, single: bool) -> None:
    """Paint the interquartile mean of the selected clients' training returns with its band; not for one or two."""
    if len(selected) <= 2:
        return
    returns, rounds = history.returns[:, selected], x_axis(history).values
    known = np.isfinite(returns).any(axis=1)
    mean, low, high = _bootstrap_band(returns[known])
    axes.fill_between(rounds[known], low, high, color=MUTED, alpha=0.3, linewidth=0)
    axes.plot(rounds[known], mean, color=INK, linewidth=2, zorder=4, **marker_style(len(rounds)))
    if known.any():
        label_line(axes, mean[-1], "IQM of clients" if single else "IQM", INK, "bold")


def _paint_evaluations(axes: Axes, history: History, selected: np.ndarray) -> None:
    """Paint the evaluations as diamonds: their interquartile mean, or of one or two clients each by itself."""
    returns = np.vstack([history.before[selected], history.client_series(EVALUATION_RETURN)[:, selected]])
    returns[-1] = np.where(np.isfinite(returns[-1]), returns[-1], history.after[selected])
    rounds = x_axis(history).with_start
    parts = [(returns, INK)]
    if len(selected) <= 2:
        parts = [(returns[:, [k]], line_colour(k)) for k in range(len(selected))]
    for part, colour in parts:
        known = np.isfinite(part).any(axis=1)
        means = [_iqm(row[np.isfinite(row)]) for row in part[known]]
        axes.plot(rounds[known], means, "D", color=colour, markersize=5, markeredgecolor=PAPER, zorder=5, clip_on=False)


def _bootstrap_band(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute [R, k] -> interquartile mean over the known clients and its 95 % bootstrap interval, [R] each."""
    rows = [row[np.isfinite(row)] for row in returns]
    generator = np.random.default_rng(0)
    mean = np.array([_iqm(row) for row in rows])
    resampled = [interquartile_mean(stratified_resamples(row[:, None], generator, RESAMPLES)) for row in rows]
    low, high = np.quantile(np.array(resampled).reshape(len(rows), RESAMPLES), [0.025, 0.975], axis=1)
    return mean, low, high


def _iqm(returns: np.ndarray) -> float:
    """Compute the interquartile mean of [k]."""
    return float(interquartile_mean(returns[:, None]))
