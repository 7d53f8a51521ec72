"""Methods side by side, as a page in Markdown and as curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import Drawing, by_round, colour_of, dash_of, drawing, label_end, marks
from grpo_fed.reports.comparison.verdicts import Comparison, MethodResult
from grpo_fed.reports.figures import FIGURES
from grpo_fed.reports.tables import many, number
from grpo_fed.runs.colours import INK, PAPER
from grpo_fed.runs.history import fill_forward, read_history
from grpo_fed.runs.statistics import Estimate, interquartile_mean, stratified_resamples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISON = "comparison"
"""The name of the files."""
RESAMPLES = 500
"""For the band of a curve."""


def markdown(found: Comparison) -> str:
    """The table, with what it can and cannot say."""
    entries = [settings.name for settings in found.scenario.clients]
    entries = entries if 1 < len(entries) <= 6 else []
    head = [
        "method",
        "return, middle half",
        *entries,
        f"better than {found.baseline}",
        "by whole seeds",
        "verdict",
        "seeds",
    ]
    rows = [head, ["---", *["---:"] * (len(entries) + 3), "---", "---:"]]
    for one in found.methods:
        cells = [f"`{one.method}`", _interval(one.iqm, number)]
        cells += [number(one.entries.get(entry)) for entry in entries]
        same = one.method == found.baseline
        cells += (
            ["", ""] if same else [_interval(chance, "{:.2f}".format) for chance in (one.better, one.better_by_seed)]
        )
        cells.append(one.verdict)
        rows.append([*cells, f"{len(one.seeds)}"])
    parts = [f"# {found.scenario.name}: {' '.join(_sentences(found))}"]
    clients, seeds = many(len(found.clients), "client"), many(len(found.seeds), "seed")
    parts.append(f"{clients}, {seeds}, {many(found.scenario.rounds, 'round')} of {found.scenario.steps:,} steps each.")
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    parts.append(_READING.format(baseline=found.baseline))
    if len({settings.env for settings in found.scenario.clients}) > 1:
        parts.append(
            "The environments pay on scales of their own: read the chance and the columns of the clients, for the"
            " middle half mixes them."
        )
    left = [f"- `{one.method}`, seed {one.seed}: {one.problem}" for one in found.runs if one.problem]
    if left:
        parts.append("## Left out\n\n" + "\n".join(left))
    if (found.out / FIGURES / f"{COMPARISON}.png").is_file():
        parts.append(f"![curves]({FIGURES}/{COMPARISON}.png)")
    return "\n\n".join(parts) + "\n"


_READING = """Return: the interquartile mean of the final policies' returns over clients and seeds, in brackets its 95 %
stratified bootstrap interval. Better: the chance that a seed beats one of `{baseline}` on the same client, 0.5 for
level. The same by whole seeds draws the clients of a run together, for they share what they learn and are not so many
witnesses. There is a difference where neither interval holds 0.5."""


def _sentences(found: Comparison) -> Iterator[str]:
    """The result first."""
    for verdict in ("better", "worse", "no difference", "one seed cannot tell", "no scores"):
        names = [one.method for one in found.methods if one.verdict == verdict]
        if not names:
            continue
        told = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        if verdict in ("better", "worse"):
            yield f"{told} {'is' if len(names) == 1 else 'are'} {verdict} than {found.baseline}."
        elif verdict == "no difference":
            yield f"No difference from {found.baseline} is seen for {told}."
        elif verdict == "no scores":
            yield f"Nothing is known of {told} against {found.baseline}."
        else:
            yield f"One seed cannot tell {told} from {found.baseline}."
    if len(found.methods) == 1:
        yield f"{found.baseline} alone."


def _interval(one: Estimate | None, show: Callable[[float], str]) -> str:
    return "-" if one is None else f"{show(one.value)} [{show(one.low)}, {show(one.high)}]"


# Curves ---------------------------------------------------------------------------------------------------------------


def curves(found: Comparison) -> Drawing | None:
    """All methods' training returns by round, and where the final policies came to; None if nobody has scores."""
    shown = [one for one in found.methods if one.iqm is not None]
    if not shown:
        return None
    lines = {one.method: _curve(found, one) for one in shown}
    caption = (
        "Left: training episodes by round, mean of the middle half over clients and seeds, with its 95 % stratified"
    )
    caption += " bootstrap interval. Right: the final policies with their likeliest actions."
    order = {one.method: place for place, one in enumerate(found.methods)}

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
        most = np.array([0.0])
        for one in shown:
            rounds, value, low, high = lines[one.method]
            most = rounds if len(rounds) > len(most) else most
            style = {"color": colour_of(order[one.method]), "linestyle": dash_of(order[one.method])}
            left.fill_between(rounds, low, high, color=style["color"], alpha=0.15, linewidth=0)
            left.plot(rounds, value, **style, **marks(len(rounds)))
            if len(value):
                label_end(left, float(value[-1]), one.method, style["color"])
        by_round(left, most)
        left.set_ylabel("return")
        for place, one in enumerate(shown):
            assert one.iqm is not None
            colour = colour_of(order[one.method])
            right.plot([one.iqm.low, one.iqm.high], [place, place], color=colour, linewidth=3, alpha=0.5)
            right.plot(one.iqm.value, place, "o", color=colour, markersize=7, markeredgecolor=PAPER)
        right.set_yticks(range(len(shown)), labels=[one.method for one in shown])
        right.tick_params(axis="y", length=0, labelcolor=INK)
        right.set_ylim(len(shown) - 0.4, -0.6)
        right.grid(visible=False, axis="y")
        right.margins(x=0.08)
        right.locator_params(axis="x", nbins=5)
        right.set_xlabel("final return")

    told = [f"{one.method} {_interval(one.iqm, number)}" for one in shown]
    alt = f"Return by round of {many(len(shown), 'method')}, and at the end: {'; '.join(told)}."
    height = max(3.4, 0.24 * len(shown) + 1)
    return drawing(COMPARISON, f"{found.scenario.name}: methods side by side", caption, alt, height, paint)


def _curve(found: Comparison, one: MethodResult) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rounds, interquartile mean and interval, [R] each; a run that stopped early stays where it was."""
    folders = {trial.seed: trial.folder for trial in found.runs if trial.method == one.method}
    histories = [read_history(folders[seed]) for seed in one.seeds]
    longest = max(len(history.lines) for history in histories)
    returns = np.full((longest, len(histories), len(found.clients)), np.nan)
    for place, history in enumerate(histories):
        returns[: len(history.lines), place] = history.returns
    returns = fill_forward(returns)
    known = np.flatnonzero(np.isfinite(returns).all(axis=(1, 2)))
    draws = np.random.default_rng(0)
    value = interquartile_mean(returns[known]) if len(known) else np.zeros(0)  # episodes longer than all rounds
    bands = [
        np.quantile(interquartile_mean(stratified_resamples(returns[r], draws, RESAMPLES)), [0.025, 0.975])
        for r in known
    ]
    low, high = np.array(bands).reshape(-1, 2).T
    return known + 1, value, low, high
