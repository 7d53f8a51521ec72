"""Performance profiles and probabilities of improvement of methods, as figures (arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.charts import (
    MAX_PANELS,
    Drawing,
    line_colour,
    line_dashes,
    make_drawing,
    panel_grid,
    scaled,
)
from grpo_fed.reports.comparison.verdicts import Comparison, MethodResult
from grpo_fed.reports.formatting import short_task
from grpo_fed.runs.colours import INK, MUTED, PAPER
from grpo_fed.runs.statistics import Estimate, performance_profile, stratified_resamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROFILES, IMPROVEMENT = "profiles", "improvement"
"""The names of the figures."""
THRESHOLDS = 101
"""Returns at which a profile is computed."""
RESAMPLES = 500
"""Bootstrap resamples of a profile's band."""


def draw_profiles(comparison: Comparison) -> Drawing | None:
    """Draw for each environment which part of all seeds and clients ends above each return; None without scores."""
    scored = [(index, method) for index, method in enumerate(comparison.methods) if len(method.scores)]
    if not scored:
        return None
    env_of = {name: entry.task for entry in comparison.scenario.clients for name in entry.names}
    envs = np.array([env_of[name] for name in comparison.clients])
    shown = list(dict.fromkeys(envs.tolist()))[:MAX_PANELS]
    rows, columns = panel_grid(len(shown))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for number, (axes, env) in enumerate(zip(panels, shown, strict=False)):
            _paint_profiles(axes, scored, envs == env)
            if len(shown) > 1:
                axes.set_title(short_task(env))
            if number % columns == 0:
                axes.set_ylabel("part above")
            if number == 0:  # the lines all end at 0, where names beside them would not tell them apart
                axes.legend(frameon=False, fontsize=scaled(9), loc="lower left")
            axes.set_xlabel("final return")
        for axes in panels[len(shown) :]:
            axes.remove()

    caption = (
        "The part of all seeds and clients whose final return is above that on the horizontal axis: a method whose"
    )
    caption += " line is higher everywhere is better. Bands: 95 % stratified bootstrap intervals, each by itself."
    medians = [f"{method.method} {np.median(method.scores):.3g}" for _, method in scored]
    half = f"; half of the returns are above: {', '.join(medians)}" if len({*envs.tolist()}) == 1 else ""
    alt = f"Performance profiles{half}."
    title = f"{comparison.scenario.name}: performance profiles"
    return make_drawing(PROFILES, title, caption, alt, 3.2 if rows == 1 else 2.5 * rows, paint)


def _paint_profiles(axes: Axes, scored: Sequence[tuple[int, MethodResult]], selected: np.ndarray) -> None:
    """Paint a line and its band for each method. selected: [K] bool, the clients of an environment."""
    parts = [(index, method.method, method.scores[:, selected]) for index, method in scored]
    low, high = min(part.min() for *_, part in parts), max(part.max() for *_, part in parts)
    room = 0.05 * (high - low) or 1.0
    thresholds = np.linspace(low - room, high + room, THRESHOLDS)
    for index, name, part in parts:
        resampled = stratified_resamples(part, np.random.default_rng(0), RESAMPLES)
        lower, upper = np.quantile(performance_profile(resampled, thresholds), [0.025, 0.975], axis=0)
        colour = line_colour(index)
        axes.fill_between(thresholds, lower, upper, color=colour, alpha=0.13, linewidth=0)
        profile = performance_profile(part, thresholds)
        axes.plot(thresholds, profile, color=colour, linestyle=line_dashes(index), drawstyle="steps-post", label=name)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(thresholds[0], thresholds[-1])


def draw_improvement(comparison: Comparison) -> Drawing | None:
    """Draw the probability that a seed of each method beats one of the baseline; None without other methods."""
    rows = [
        (index, method.method, method.better, method.better_by_seed)
        for index, method in enumerate(comparison.methods)
        if method.better is not None and method.better_by_seed is not None
    ]
    if not rows:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
        for row, (index, _, better, by_seed) in enumerate(rows):
            colour = line_colour(index)
            axes.plot([by_seed.low, by_seed.high], [row, row], color=colour, linewidth=1.2)
            axes.plot([better.low, better.high], [row, row], color=colour, linewidth=5, alpha=0.5)
            axes.plot(better.value, row, "o", color=colour, markersize=6, markeredgecolor=PAPER)
        axes.set_yticks(range(len(rows)), labels=[name for _, name, *_ in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"probability that a seed beats one of {comparison.baseline} on the same client")

    caption = (
        f"1: every seed of the method beats every seed of {comparison.baseline}; 0.5: level; a tie counts half. Thick:"
    )
    caption += " 95 % stratified bootstrap intervals. Thin: intervals from resampling whole seeds."
    ends = [f"{name} {_describe(better)}" for _, name, better, _ in rows]
    alt = f"Probability of improvement over {comparison.baseline}: {'; '.join(ends)}."
    title = f"{comparison.scenario.name}: probability of improvement"
    return make_drawing(IMPROVEMENT, title, caption, alt, 1.0 + 0.3 * len(rows), paint)


def _describe(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}, {estimate.low:.2f} to {estimate.high:.2f}"
