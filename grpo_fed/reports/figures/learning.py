"""How clients learned: their return by round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import (
    NAMED,
    PANELS,
    THIN,
    Drawing,
    by_round,
    colour_of,
    dash_of,
    drawing,
    grid_of,
    label_end,
    marks,
)
from grpo_fed.reports.tables import many, number
from grpo_fed.runs.colours import INK, MUTED
from grpo_fed.runs.history import History
from grpo_fed.runs.metrics import EVALUATION_RETURN
from grpo_fed.runs.statistics import interquartile_mean, stratified_resamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESAMPLES = 1_000
MIDDLE = "middle half"
"""The name of the interquartile mean where people read it."""


def learning(history: History) -> Drawing | None:
    """Return of each client by round, and the interquartile mean with its band; a panel for each environment."""
    envs = [env for env in dict.fromkeys(history.envs) if np.isfinite(_of_env(history, env)).any()]
    if not envs:
        return None
    shown = envs[:PANELS]
    rows, columns = grid_of(len(shown))
    at = np.array([0, *history.rounds]) if np.isfinite(history.before).any() else history.rounds

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, (one, env) in enumerate(zip(axes, shown, strict=False)):
            _curves(one, history, env, alone=len(shown) == 1)
            by_round(one, at, label=place >= len(shown) - columns)
            if len(shown) > 1:
                one.set_title(env)
            if place % columns == 0:
                one.set_ylabel("return")
        for one in axes[len(shown) :]:
            one.remove()

    last = _latest(history)
    told = [f"{env}: {_told(last[np.array(history.envs) == env])}" for env in shown]
    whole = f"{many(len(history.clients), 'client')} over {many(len(history.lines), 'round')}"
    alt = f"Return by round of {whole}; {'; '.join(told)}."
    caption = " ".join(_reading(history, shown, len(envs)))
    return drawing("learning", "Return by round", caption, alt, 3.7 if rows == 1 else 2.6 * rows, paint)


def _reading(history: History, shown: Sequence[str], envs: int) -> Iterator[str]:
    """How to read the curves."""
    counts = [history.envs.count(env) for env in shown]
    if min(counts) <= THIN:
        yield "Lines: return of the training episodes of a client."
    if max(counts) > THIN:
        yield "Light bands: the training episodes of 90 % and of half of the clients."
    if max(counts) > 2:
        yield "Thick: the mean of the middle half of the clients, and its 95 % bootstrap interval."
    if np.isfinite(history.before).any() or np.isfinite(history.after).any():
        yield "Diamonds: the likeliest actions, played without learning."
    if envs > len(shown):
        yield f"The first {len(shown)} of {envs} environments."


def _of_env(history: History, env: str) -> np.ndarray:
    """[R, k]: of the clients with this environment."""
    return history.returns[:, np.array(history.envs) == env]


def _latest(history: History) -> np.ndarray:
    """[K]: what is known of how the clients do."""
    return np.where(np.isfinite(history.after), history.after, history.returns[-1])


def _told(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not known.size:
        return "no episode has ended"
    if known.size == 1:
        return f"at the end {number(float(known[0]))}"
    where = "in the middle half" if known.size > 3 else "on average"
    ends = f"from {number(float(known.min()))} to {number(float(known.max()))}"
    return f"at the end {number(_iqm(known))} {where}, {ends}"


def _curves(axes: Axes, history: History, env: str, alone: bool) -> None:
    """The lines of the clients with an environment."""
    mine = np.flatnonzero(np.array(history.envs) == env)
    returns, rounds = history.returns[:, mine], history.rounds
    names = [history.clients[k] for k in mine]
    entries = [history.entries[k] for k in mine]
    kinds = list(dict.fromkeys(entries))
    if len(names) > THIN:
        _fans(axes, rounds, returns, entries)
    elif len(names) <= NAMED and len(kinds) in (1, len(names)):
        _lines(axes, rounds, returns, list(range(len(names))), 1.0)
        for k, name in enumerate(names):
            _label(axes, returns[-1, k], name, colour_of(k))
    elif 1 < len(kinds) <= NAMED:
        _lines(axes, rounds, returns, [kinds.index(entry) for entry in entries], 1.0 if len(names) <= NAMED else 0.45)
        for place, kind in enumerate(kinds):
            ends = returns[-1, [entry == kind for entry in entries]]
            if np.isfinite(ends).any():
                _label(axes, float(np.nanmean(ends)), _entry(kind, entries), colour_of(place))
    else:
        _lines(axes, rounds, returns, [0] * len(names), 0.4)
        if np.isfinite(returns[-1]).any():
            for k in dict.fromkeys((int(np.nanargmax(returns[-1])), int(np.nanargmin(returns[-1])))):
                _label(axes, returns[-1, k], names[k], colour_of(0))
    _middle(axes, history, mine, alone)


def _lines(axes: Axes, rounds: np.ndarray, returns: np.ndarray, kinds: Sequence[int], alpha: float) -> None:
    """A line for each client, in the colour of its kind."""
    for k, kind in enumerate(kinds):
        seen = np.isfinite(returns[:, k])
        style = {"color": colour_of(kind), "linestyle": dash_of(kind), "alpha": alpha, "linewidth": 1.3}
        axes.plot(rounds[seen], returns[seen, k], **style, **marks(len(rounds)))


def _label(axes: Axes, y: float, text: str, colour: str) -> None:
    if np.isfinite(y):
        label_end(axes, y, text, colour)


def _entry(kind: str, entries: Sequence[str]) -> str:
    count = entries.count(kind)
    return kind if count == 1 else f"{kind} ({count:,})"


def _fans(axes: Axes, rounds: np.ndarray, returns: np.ndarray, entries: Sequence[str]) -> None:
    """Quantiles of many clients, of each entry on its own where there are few."""
    kinds = list(dict.fromkeys(entries))
    kinds = kinds if len(kinds) <= 3 else [""]
    for place, kind in enumerate(kinds):
        own = returns if not kind else returns[:, [entry == kind for entry in entries]]
        seen = np.isfinite(own).any(axis=1)
        if not seen.any():
            continue
        low, quarter, three, high = np.nanquantile(own[seen], [0.05, 0.25, 0.75, 0.95], axis=1)
        axes.fill_between(rounds[seen], low, high, color=colour_of(place), alpha=0.18, linewidth=0)
        axes.fill_between(rounds[seen], quarter, three, color=colour_of(place), alpha=0.28, linewidth=0)
        if len(kinds) > 1:
            label_end(axes, (quarter[-1] + three[-1]) / 2, _entry(kind, entries), colour_of(place))


def _middle(axes: Axes, history: History, mine: np.ndarray, alone: bool) -> None:
    """The interquartile mean with its band, and that of the likeliest actions."""
    rounds, returns = history.rounds, history.returns[:, mine]
    played = np.vstack([history.before[mine], history.client_series(EVALUATION_RETURN)[:, mine]])
    played[-1] = np.where(np.isfinite(played[-1]), played[-1], history.after[mine])
    if len(mine) > 2:
        seen = np.isfinite(returns).any(axis=1)
        value, low, high = _band(returns[seen])
        axes.fill_between(rounds[seen], low, high, color=MUTED, alpha=0.3, linewidth=0)
        axes.plot(rounds[seen], value, color=INK, linewidth=2, zorder=4, **marks(len(rounds)))
        if seen.any():
            label_end(axes, value[-1], MIDDLE if alone else "middle", INK, "bold")
    at = np.array([0, *rounds])
    for which, colour in [(slice(None), INK)] if len(mine) > 2 else [(k, colour_of(k)) for k in range(len(mine))]:
        own = played[:, which].reshape(len(at), -1)
        there = np.isfinite(own).any(axis=1)
        values = [_iqm(row[np.isfinite(row)]) for row in own[there]]
        axes.plot(
            at[there], values, "D", color=colour, markersize=5, zorder=5, clip_on=False, markeredgecolor="#ffffff"
        )


def _band(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R, k] -> interquartile mean and 95 % bootstrap interval over the clients that are known, [R] each."""
    rows = [row[np.isfinite(row)] for row in returns]
    draws = np.random.default_rng(0)
    value = np.array([_iqm(row) for row in rows])
    found = [interquartile_mean(stratified_resamples(row[:, None], draws, RESAMPLES)) for row in rows]
    low, high = np.quantile(np.array(found).reshape(len(rows), RESAMPLES), [0.025, 0.975], axis=1)
    return value, low, high


def _iqm(known: np.ndarray) -> float:
    return float(interquartile_mean(known[:, None]))
