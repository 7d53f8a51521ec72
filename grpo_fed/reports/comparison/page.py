"""A comparison of methods as a page in Markdown and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from grpo_fed.reports.axis import AxisName, XAxis, x_axis
from grpo_fed.reports.charts import (
    Drawing,
    label_line,
    line_colour,
    line_dashes,
    make_drawing,
    marker_style,
)
from grpo_fed.reports.comparison.profiles import IMPROVEMENT, PROFILES
from grpo_fed.reports.comparison.verdicts import Comparison, MethodResult, normalise_clients
from grpo_fed.reports.figures.write import FIGURES
from grpo_fed.reports.formatting import format_count, format_return
from grpo_fed.reports.latex import tabular
from grpo_fed.runs.colours import INK, PAPER
from grpo_fed.runs.history import fill_forward, read_history
from grpo_fed.runs.statistics import Estimate, estimate, interquartile_mean, stratified_resamples
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.scores import are_known, scales_of, unknown_scales_cure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISON = "comparison"
"""The name of all files of a comparison, without their endings."""
RESAMPLES = 500
"""Bootstrap resamples for the band of a curve."""
ADAPTATION = "adaptation"
"""The name of the figure of adaptation."""
MAX_ENTRIES = 6
"""Up to so many entries of the scenario have a column of returns each."""

MIXED_READING = """The environments are unlike, so the mean is not of returns but of normalised scores, 0 for random
actions and 1 for a reference. The columns of single clients are returns."""

READING = """{score}: the interquartile mean of the final policies' {scores} over clients and seeds, in brackets its
95 % stratified bootstrap interval. Better: the probability that a seed of the method beats a seed of `{baseline}` on
the same client; 0.5 means level. By seed: the same probability, with an interval from resampling whole seeds, since
clients of one run share what they learn and are not independent. A difference is claimed only where neither interval
contains 0.5."""

ADAPTATION_READING = """Before and after adaptation: the interquartile mean of {who}, with an interval from resampling
whole seeds. Copies of their last policies adapt to their own tasks. The verdict does not regard it."""


def comparison_markdown(comparison: Comparison) -> str:
    """Write the page: the result in words, the table, and how to read it."""
    scenario, name = comparison.scenario, comparison.score_name
    parts = [f"# {scenario.name}: {' '.join(_verdict_sentences(comparison))}"]
    clients, seeds = format_count(len(comparison.clients), "client"), format_count(len(comparison.seeds), "seed")
    steps = f"{scenario.steps:,} {scenario.unit}"
    parts.append(f"{clients}, {seeds}, {format_count(scenario.rounds, 'round')} of {steps} each.")
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in _table(comparison)))
    parts.append(READING.format(baseline=comparison.baseline, score=name.capitalize(), scores=f"{name}s"))
    if scales := scales_of(scenario):
        parts.append(
            MIXED_READING if are_known(scales.values()) else f"No score of the whole: {unknown_scales_cure(scales)}."
        )
    if scenario.evaluate.adapt:
        parts.append(
            ADAPTATION_READING.format(
                who="the clients that take no part in training" if _has_held_out(scenario) else "all clients"
            )
        )
    left_out = [f"- `{run.method}`, seed {run.seed}: {run.problem}" for run in comparison.runs if run.problem]
    if left_out:
        parts.append("## Left out\n\n" + "\n".join(left_out))
    figures = [f"{FIGURES}/{name}.png" for name in (COMPARISON, PROFILES, IMPROVEMENT, ADAPTATION)]
    parts += [f"![curves]({figure})" for figure in figures if (comparison.out / figure).is_file()]
    return "\n\n".join(parts) + "\n"


def comparison_latex(comparison: Comparison) -> str:
    """Write the table as LaTeX, which needs the package booktabs."""
    head, _, *rows = _table(comparison)
    columns = "l" + "r" * (len(head) - 3) + "lr"
    table = tabular(head, [[cell.replace("`", "") for cell in row] for row in rows], columns)
    return f"% needs \\usepackage{{booktabs}}; {comparison.out.name}/{COMPARISON}.md says how to read it\n{table}"


def _table(comparison: Comparison) -> Iterator[Sequence[str]]:
    """Make the table's head, its rule, and a row for each method."""
    entries = [settings.name for settings in comparison.scenario.clients]
    entries = entries if 1 < len(entries) <= MAX_ENTRIES else []
    better = f"better than {comparison.baseline}"
    updates = comparison.scenario.evaluate.adapt
    adapted = ["before adaptation", f"after {format_count(updates, 'update')}"] if updates else []
    yield ["method", comparison.score_name, *entries, *adapted, better, "by seed", "verdict", "seeds"]
    yield ["---", *["---:"] * (len(entries) + len(adapted) + 3), "---", "---:"]
    for method in comparison.methods:
        probabilities = [method.better, method.better_by_seed]
        is_baseline = method.method == comparison.baseline
        yield [
            f"`{method.method}`",
            format_interval(method.iqm, format_return),
            *(format_return(method.entries.get(entry)) for entry in entries),
            *(format_interval(method.adapted(number), format_return) for number in ((0, updates) if updates else ())),
            *("" if is_baseline else format_interval(value, "{:.2f}".format) for value in probabilities),
            method.verdict,
            f"{len(method.seeds)}",
        ]


def _has_held_out(scenario: Scenario) -> bool:
    return not all(settings.trains for settings in scenario.clients)


def _verdict_sentences(comparison: Comparison) -> Iterator[str]:
    """Write a sentence for each verdict that some method has."""
    baseline = comparison.baseline
    for verdict in ("better", "worse", "no difference", "one seed cannot tell", "no scores"):
        methods = [method.method for method in comparison.methods if method.verdict == verdict]
        if not methods:
            continue
        names = " and ".join([", ".join(methods[:-1]), methods[-1]] if len(methods) > 1 else methods)
        is_one = len(methods) == 1
        if verdict in ("better", "worse"):
            yield f"{names} {'is' if is_one else 'are'} {verdict} than {baseline}."
        elif verdict == "no difference":
            yield f"{names} {'shows' if is_one else 'show'} no difference from {baseline}."
        elif verdict == "no scores":
            yield f"{names} {'has' if is_one else 'have'} no scores to compare with {baseline}."
        else:
            yield f"One seed cannot tell {names} from {baseline}."
    if len(comparison.methods) == 1:
        yield f"{baseline} alone."


def format_interval(estimate: Estimate | None, format_value: Callable[[float], str]) -> str:
    """Write an estimate with its interval: `0.83 [0.61, 0.97]`; `-` if there is none."""
    if estimate is None:
        return "-"
    return f"{format_value(estimate.value)} [{format_value(estimate.low)}, {format_value(estimate.high)}]"


# Curves ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Curve:
    """A method's returns by round, or by local update: interquartile mean over clients and seeds; [R] each."""

    rounds: np.ndarray
    """The rounds' numbers, or the numbers of local updates."""
    mean: np.ndarray
    low: np.ndarray
    """Lower end of the 95 % stratified bootstrap interval."""
    high: np.ndarray
    """Upper end."""
    axis: XAxis
    """The axis with these rounds as its values."""


def draw_comparison(comparison: Comparison, axis: AxisName = "rounds") -> Drawing | None:
    """Draw the training returns of all methods by round, and the final returns; None if no method has scores.

    axis: what the horizontal axis counts; methods send unlike numbers of bytes in a round.
    """
    scored = [(index, method) for index, method in enumerate(comparison.methods) if method.iqm is not None]
    if not scored:
        return None
    curves = {index: method_curve(comparison, method, axis) for index, method in scored}
    longest = max(curves.values(), key=lambda curve: float(curve.rounds[-1]) if len(curve.rounds) else 0.0)
    name = comparison.score_name
    caption = f"Left: training {name}s by {longest.axis.short}, interquartile mean over clients and seeds, with its"
    caption += " 95 % stratified bootstrap interval. Right: the final policies with their likeliest actions."

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
        for index, method in scored:
            _paint_curve(left, curves[index], method.method, index)
        longest.axis.place(left)
        left.set_ylabel(name)
        _paint_final_returns(right, scored, name)

    ends = [f"{method.method} {format_interval(method.iqm, format_return)}" for _, method in scored]
    alt = f"{name.capitalize()} by round of {format_count(len(scored), 'method')}, and at the end: {'; '.join(ends)}."
    height = max(3.4, 0.24 * len(scored) + 1)
    return make_drawing(COMPARISON, f"{comparison.scenario.name}: methods side by side", caption, alt, height, paint)


def _paint_curve(axes: Axes, curve: Curve, name: str, index: int) -> None:
    colour = line_colour(index)
    axes.fill_between(curve.rounds, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    style = {"color": colour, "linestyle": line_dashes(index)}
    axes.plot(curve.rounds, curve.mean, **style, **marker_style(len(curve.rounds)))
    if len(curve.mean):
        label_line(axes, float(curve.mean[-1]), name, colour)


def _paint_final_returns(axes: Axes, scored: Sequence[tuple[int, MethodResult]], name: str) -> None:
    """Paint the interval of each method's final return as a row."""
    for row, (index, method) in enumerate(scored):
        assert method.iqm is not None
        colour = line_colour(index)
        axes.plot([method.iqm.low, method.iqm.high], [row, row], color=colour, linewidth=3, alpha=0.5)
        axes.plot(method.iqm.value, row, "o", color=colour, markersize=7, markeredgecolor=PAPER)
    axes.set_yticks(range(len(scored)), labels=[method.method for _, method in scored])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(scored) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"final {name}")


def draw_adaptations(comparison: Comparison) -> Drawing | None:
    """Draw the returns of all methods by local update; None if no method was adapted."""
    adapted = [
        (index, method.method, method.adaptation)
        for index, method in enumerate(comparison.methods)
        if method.adaptation is not None
    ]
    if not adapted:
        return None
    curves = [(index, name, adaptation_curve(returns)) for index, name, returns in adapted]
    who = "clients that took no part in training" if _has_held_out(comparison.scenario) else "all clients"
    caption = f"Returns of {who} while the last policies adapt to their tasks: interquartile mean over clients"
    caption += " and seeds, with its 95 % interval from resampling whole seeds."

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, name, curve in curves:
            _paint_curve(axes, curve, name, index)
        curves[0][2].axis.place(axes)
        axes.set_xlabel("local updates")
        axes.set_ylabel(comparison.score_name)

    ends = [f"{name} {format_return(curve.mean[0])} to {format_return(curve.mean[-1])}" for _, name, curve in curves]
    alt = f"Return by local update of {format_count(len(curves), 'method')}: {'; '.join(ends)}."
    return make_drawing(ADAPTATION, f"{comparison.scenario.name}: adaptation", caption, alt, 3.4, paint)


def adaptation_curve(returns: np.ndarray) -> Curve:
    """Compute the interquartile mean and its interval after each local update, from [S, H, U + 1]."""
    generator, scores = np.random.default_rng(0), [returns[:, :, number] for number in range(returns.shape[2])]
    estimates = [
        estimate(interquartile_mean, each, generator=generator, resamples=RESAMPLES, whole_seeds=True)
        for each in scores
    ]
    mean, low, high = np.array([(each.value, each.low, each.high) for each in estimates]).T
    updates = np.arange(returns.shape[2])
    return Curve(updates, mean, low, high, XAxis("rounds", updates, "local updates", "local update"))


def method_curve(comparison: Comparison, method: MethodResult, axis: AxisName = "rounds") -> Curve:
    """Compute a method's curve; a run that stopped early keeps its last returns.

    A round is at the mean of what its seeds have counted until then; a method that sends no bytes is at 0 throughout.
    """
    folders = {run.seed: run.folder for run in comparison.runs if run.method == method.method}
    histories = [read_history(folders[seed]) for seed in method.seeds]
    rounds = max(len(history.lines) for history in histories)
    returns = np.full((rounds, len(histories), len(comparison.clients)), np.nan)  # [R, S, K]
    for index, history in enumerate(histories):
        comparable = normalise_clients(history, history.returns[:, history.trains])
        assert comparable is not None, "a method with a mean has scores that can be compared"
        returns[: len(history.lines), index] = comparable
    returns = fill_forward(returns)
    known = np.flatnonzero(np.isfinite(returns).all(axis=(1, 2)))
    generator = np.random.default_rng(0)
    mean = interquartile_mean(returns[known]) if len(known) else np.zeros(0)  # no episode may have ended
    bands = [
        np.quantile(interquartile_mean(stratified_resamples(returns[r], generator, RESAMPLES)), [0.025, 0.975])
        for r in known
    ]
    low, high = np.array(bands).reshape(-1, 2).T
    places = _mean_places([x_axis(history, axis, in_megabytes=True) for history in histories], rounds)
    return Curve(places.values[known], mean, low, high, replace(places, values=places.values[known]))


def _mean_places(axes: Sequence[XAxis], rounds: int) -> XAxis:
    """Average where each round is over the seeds; a run that stopped early stays at its end."""
    if axes[0].name == "rounds":
        return replace(axes[0], values=np.arange(1, rounds + 1))
    values = np.full((rounds, len(axes)), np.nan)
    for index, axis in enumerate(axes):
        values[: len(axis.values), index] = axis.values
    return replace(axes[0], values=fill_forward(values).mean(axis=1))
