"""Figures of a run, from its folder alone: how clients learned, what they share, how far steps went, what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fed.files import write_whole
from grpo_fed.history import EVALUATED, History, filled, history_of
from grpo_fed.notes import MB
from grpo_fed.palette import INK, MUTED
from grpo_fed.showing.charts import (
    PERSONAL,
    SHARED,
    Drawing,
    by_round,
    colour_of,
    dash_of,
    drawing,
    grid_of,
    label_end,
    marks,
)
from grpo_fed.showing.tables import many, number, some, span
from grpo_fed.statistics import interquartile_mean, stratified_resamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = "figures"
ORDER = ("learning", "groups", "kl", "steps", "bytes", "time")
"""The names of all figures, as one looks at them."""
NAMED = 10
"""So many lines of an axes have a name beside them; more would be small print."""
THIN = 40
"""Up to so many clients have a line each; more are a fan of quantiles."""
PANELS = 12
RESAMPLES = 1_000
DARK = "#101418"
"""Of marks on a map: its cells are light on dark paper too, so that our ink would not do."""
MIDDLE = "middle half"
"""The name of the interquartile mean where people read it."""


def draw(folder: str | Path) -> list[Path]:
    """Write `figures/*.png` and `.svg` of a run folder, finished or not; what there is nothing to say of is left out.

    Those of an earlier time go. ValueError if it is no run folder.
    """
    folder = Path(folder)
    drawn = list(drawings(history_of(folder)))
    home = folder / FIGURES
    home.mkdir(exist_ok=True)
    for old in [*home.glob("*.png"), *home.glob("*.svg")]:
        old.unlink()
    return write(home, drawn)


def write(home: Path, drawn: Sequence[Drawing]) -> list[Path]:
    """A PNG and an SVG of each."""
    paths = []
    for one in drawn:
        write_whole(home / f"{one.name}.png", one.png)
        write_whole(home / f"{one.name}.svg", one.svg)
        paths += [home / f"{one.name}.png", home / f"{one.name}.svg"]
    return paths


def drawings(history: History) -> Iterator[Drawing]:
    """All figures that there is something to show in."""
    if not history.lines:
        return
    for one in (learning, groups, kl, steps, traffic, pace):
        drawn = one(history)
        if drawn is not None:
            yield drawn


# Returns --------------------------------------------------------------------------------------------------------------


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
    played = np.vstack([history.before[mine], history.each(EVALUATED)[:, mine]])
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


# What is shared -------------------------------------------------------------------------------------------------------


def groups(history: History) -> Drawing | None:
    """Who has left which group of the shared blocks, by round, and who had no answer; None where there is neither.

    A panel for each group, or where they are many for each block.
    """
    if not history.left.any() and not history.failed.any():
        return None
    names, shares = _shares(history)
    order = _order(history, shares)
    shown = sorted(sorted(range(len(names)), key=lambda g: -shares[..., g].mean())[:PANELS])
    rows, columns = grid_of(len(shown), 4 if len(history.clients) > THIN else 3)
    by_block = len(history.homes) > PANELS and bool(history.left.any())
    caption = "Blue: the client shares it. Orange: it has left and keeps its own."
    caption += " Between: it has left some of the block's groups." if by_block else ""
    few = _few(history)
    if history.failed.any():
        caption += " x: no answer." if few else " Grey: no answer."
    if few and (~history.trained & ~history.failed).any():
        caption += " Dot: it was not drawn."
    if not few:
        caption += " Clients in the order of how much they keep to themselves."
    if len(shown) < len(names):
        caption += f" The {len(shown)} of {len(names)} that most clients left."

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, (one, g) in enumerate(zip(axes, shown, strict=False)):
            _map(one, history, shares[:, order, g], order, place % columns == 0)
            by_round(one, history.rounds, label=place >= len(shown) - columns)
            one.set_xlim(history.rounds[0] - 0.5, history.rounds[-1] + 0.5)
            inside = many(list(history.homes.values()).count(names[g]), "group")
            one.set_title(f"{names[g]} ({inside})" if by_block else names[g], size=9.5)
        for one in axes[len(shown) :]:
            one.remove()

    clients = len(history.clients)
    height = rows * (0.55 + (0.2 * clients + 0.25 if few else 2.4))
    return drawing(
        "groups", "Shared or personal, by round", caption, _groups_told(history), min(max(height, 1.5), 11), paint
    )


def _few(history: History) -> bool:
    return len(history.clients) <= THIN


def _shares(history: History) -> tuple[list[str], np.ndarray]:
    """What has a panel, groups or if they are many blocks; and how much of each a client has left, [R, K, panels]."""
    if not history.left.any():
        return ["all that is shared"], np.zeros((*history.left.shape[:2], 1))
    if len(history.homes) <= PANELS:
        return list(history.homes), history.left.astype(float)
    blocks = list(dict.fromkeys(history.homes.values()))
    member = np.array([[home == block for block in blocks] for home in history.homes.values()], float)
    return blocks, history.left @ (member / member.sum(axis=0))


def _order(history: History, shares: np.ndarray) -> np.ndarray:
    """The scenario's, or where names would not be read anyway, who has left most last."""
    if _few(history):
        return np.arange(len(history.clients))
    weight = shares.mean(axis=2)
    return np.lexsort((weight.mean(axis=0), weight[-1]))


def _map(axes: Axes, history: History, shares: np.ndarray, order: np.ndarray, names: bool) -> None:
    """[R, K] as cells, a row for each client."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    few, clients, rounds = _few(history), len(order), history.rounds
    cells = LinearSegmentedColormap.from_list("share", [SHARED, PERSONAL])(shares.T)[..., :3]
    failed = history.failed[:, order].T
    if not few:
        cells[failed] = to_rgb(MUTED)
    extent = (rounds[0] - 0.5, rounds[-1] + 0.5, clients - 0.5, -0.5)
    axes.imshow(cells, aspect="auto", interpolation="nearest" if few else "antialiased", extent=extent)
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


# The step -------------------------------------------------------------------------------------------------------------


def kl(history: History) -> Drawing | None:
    """KL of the server's step, measured or predicted, against the budget of each block and of all together."""
    names = [name for name in ("joint", *history.blocks) if np.isfinite(history.whole(f"kl/{name}")).any()]
    if not names:
        return None
    if len(names) > PANELS:
        return _kl_map(history, names)
    rows, columns = grid_of(len(names))
    source = "predicted by a Fisher matrix" if history.scenario.proximity.mode == "quadratic" else "measured"
    has_budget = any(np.isfinite(history.whole(f"budget/{name}")).any() for name in names)
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
    wanted, budget = history.whole(f"wanted/{name}"), history.whole(f"budget/{name}")
    return bool((wanted > budget).any())


def _looked_back(history: History, name: str) -> np.ndarray:
    """[R]: the KL of a round's step as the next round's clients found it."""
    return np.append(history.whole(f"last_kl/{name}")[1:], np.nan)


def _budget(axes: Axes, history: History, name: str) -> None:
    """One block's KL and budget by round."""
    rounds = history.rounds
    found, budget = history.whole(f"kl/{name}"), filled(history.whole(f"budget/{name}"))
    wanted, later = history.whole(f"wanted/{name}"), _looked_back(history, name)
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
    found, budget = history.whole(f"kl/{name}"), history.whole(f"budget/{name}")
    most = f"{'all together' if name == 'joint' else name} at most {np.nanmax(found):.2g}"
    if not np.isfinite(budget).any():
        return f"{most}, no budget"
    return f"{most} of {np.nanmax(budget):.2g}"


def _kl_map(history: History, names: Sequence[str]) -> Drawing | None:
    """The part of its budget that each of many blocks used."""
    used = np.stack([history.whole(f"kl/{name}") / history.whole(f"budget/{name}") for name in names])
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
    alphas = np.stack([history.whole(f"alpha/{block}") for block in history.blocks]) if history.blocks else np.zeros(0)
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


# What it cost ---------------------------------------------------------------------------------------------------------


def traffic(history: History) -> Drawing | None:
    """Bytes of each round, up and down."""
    up, down = history.whole("comm/MB_up"), history.whole("comm/MB_down")
    total = np.nan_to_num(up).sum() + np.nan_to_num(down).sum()
    if not total:
        return None
    scale, unit = (1e-3, "GB") if max(np.nanmax(up), np.nanmax(down)) >= 1000 else (1.0, "MB")
    if max(np.nanmax(up), np.nanmax(down)) < 0.1:
        scale, unit = 1e3, "kB"
    sums = f"{megabytes(np.nansum(up))} up, {megabytes(np.nansum(down))} down"
    caption = f"Of all clients together; in all rounds {sums}"
    if (whole := whole_traffic(history)) is not None:
        caption += f", and with the plays before and after them {megabytes(sum(whole))}"
    caption += ". Groups that nobody moved are not sent."
    rows = {"to the server": up, "to the clients": down}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (label, row) in enumerate(rows.items()):
            seen = np.isfinite(row)
            style = {"color": colour_of(place), "linestyle": dash_of(place)}
            axes.plot(history.rounds[seen], row[seen] * scale, **style, **marks(len(row)))
            label_end(axes, float(row[seen][-1] * scale), label, colour_of(place))
        axes.set_ylim(0, float(np.nanmax([up, down])) * scale * 1.12)
        axes.set_ylabel(f"{unit} a round")
        by_round(axes, history.rounds)

    alt = f"Bytes that were sent in each of {many(len(up), 'round')}; in all {sums}."
    return drawing("bytes", "Bytes by round", caption, alt, 2.6, paint)


def whole_traffic(history: History) -> tuple[float, float] | None:
    """MB up and down of the whole run, which lines of rounds do not tell: policies also play before the first round
    and after the last. None while there are no results.
    """
    if history.results is None:
        return None
    return history.results["bytes_up"] / MB, history.results["bytes_down"] / MB


def megabytes(value: float) -> str:
    """As GB, MB or kB."""
    if value >= 1000:
        return f"{value / 1000:,.2f} GB"
    return f"{value:,.1f} MB" if value >= 1 else f"{value * 1000:,.1f} kB"


def pace(history: History) -> Drawing | None:
    """Seconds of each round, and environment steps a second."""
    panels: Mapping[str, np.ndarray] = {
        "seconds a round": history.whole("time/round_s"),
        "steps a second": history.whole("charts/SPS"),
    }
    seconds = panels["seconds a round"]
    if not np.isfinite(seconds).any():
        return None
    caption = f"{many(len(seconds), 'round')} in {span(float(np.nansum(seconds)))}, and in the median round"
    caption += f" {np.nanmedian(seconds):.2f} s, {np.nanmedian(panels['steps a second']):,.0f} steps a second."

    def paint(figure: Figure) -> None:
        for place, (axes, (label, row)) in enumerate(zip(figure.subplots(1, 2), panels.items(), strict=True)):
            seen = np.isfinite(row)
            axes.plot(history.rounds[seen], row[seen], color=colour_of(place), **marks(len(row)))
            axes.fill_between(history.rounds[seen], 0, row[seen], color=colour_of(place), alpha=0.15, linewidth=0)
            axes.set_ylim(0, float(np.nanmax(row)) * 1.12 or 1)
            axes.set_title(label, color=MUTED)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}")
            by_round(axes, history.rounds)

    return drawing("time", "Time by round", caption, f"Seconds and steps a second by round: {caption}", 2.3, paint)
