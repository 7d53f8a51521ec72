"""Methods side by side: the same scenario and seeds for each, and what a handful of seeds can say of the difference.

Scores are the final policies' mean returns with deterministic actions, [S, K]: a seed, a client. The interquartile mean
and the probability of improvement are those of arXiv 2108.13264, with its stratified bootstrap, for which a client is a
task. That bootstrap takes a seed's clients for independent, and clients that share blocks are not: one lucky run lifts
all of them. So a difference is only called one if whole seeds, drawn together, show it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fed import checkpoint
from grpo_fed.charts import INK, PAPER, Drawing, by_round, colour_of, dash_of, drawing, label_end, marks
from grpo_fed.figures import FIGURES, write
from grpo_fed.files import write_whole
from grpo_fed.gallery import find
from grpo_fed.history import filled, history_of
from grpo_fed.journal import Result, Status, results_of
from grpo_fed.notes import line_of
from grpo_fed.saved import SCENARIO
from grpo_fed.scenario import Scenario
from grpo_fed.statistics import (
    Estimate,
    estimate,
    interquartile_mean,
    probability_of_improvement,
    stratified_resamples,
)
from grpo_fed.tables import many, number
from grpo_fed.tracking import Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISON = "comparison"
"""The name of the files."""
BASELINE = "local"
"""The method that the others are held against, where it is among them."""
RESAMPLES = 500
"""For the band of a curve."""

Run = Callable[[Scenario, Path], object]
"""Runs a scenario and leaves a run folder; what is there of it already may be gone on with."""


@dataclass(frozen=True)
class Trial:
    """A method with a seed."""

    method: str
    seed: int
    folder: Path
    problem: str = ""
    """Why its scores do not count; empty if they do."""


@dataclass(frozen=True, eq=False)
class Standing:
    """What became of a method."""

    method: str
    seeds: tuple[int, ...]
    """[S]: whose scores count."""
    scores: np.ndarray
    """[S, K]."""
    iqm: Estimate | None
    """None where there are no scores."""
    entries: Mapping[str, float]
    """Mean score of the clients of each of the scenario's entries, over clients and seeds."""
    better: Estimate | None
    """The chance that a seed of it beats one of the baseline on the same client; None for the baseline itself."""
    better_by_seed: Estimate | None
    """The same with whole seeds drawn together."""
    verdict: str
    """`better`, `worse`, `no difference`, or why nothing can be said; empty for the baseline."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side."""

    scenario: Scenario
    """As the first method has it; of the others method and seed differ, and what follows from them."""
    baseline: str
    seeds: tuple[int, ...]
    standings: tuple[Standing, ...]
    trials: tuple[Trial, ...]
    out: Path

    @property
    def clients(self) -> tuple[str, ...]:
        """[K]."""
        return tuple(name for settings in self.scenario.clients for name in settings.names)

    def document(self) -> dict[str, Any]:
        """As `comparison.json` has it."""
        return {
            "scenario": self.scenario.name,
            "baseline": self.baseline,
            "seeds": list(self.seeds),
            "clients": list(self.clients),
            "methods": {one.method: _document(one) for one in self.standings},
            "left_out": [
                {"method": one.method, "seed": one.seed, "why": one.problem} for one in self.trials if one.problem
            ],
        }


def compare(
    scenario: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    run: Run | None = None,
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    watch: Callable[[Trial], None] = lambda trial: None,
) -> Comparison:
    """Run every method with every seed, each in `out/<method>/seed-<n>/`, and write what comes of it to `out`.

    scenario: a file or the name of one that ships, with `overrides` such as "rounds=5" for every run. What has finished
    is not run again, so that a comparison that was stopped goes on when it is asked for again; more methods and seeds
    may be asked for. By default runs are the local engine's, and one that was stopped goes on; `run` is another way to
    run one. A run that fails is left out and named, and the others go on. `watch` hears of every trial when it
    is over. ValueError, before anything is run, for what is wrong with a scenario, and for a folder that holds the run
    of another one.
    """
    out, run = Path(out), run or run_locally
    _refuse_unusable(methods, seeds, baseline)
    source = find(str(scenario))
    planned = []
    for method in methods:
        for seed in seeds:
            loaded = Scenario.load(source, [*overrides, f"method={method}", f"seed={seed}"])
            planned.append((loaded, Trial(method, seed, _home(out, method, seed))))
    for loaded, trial in planned:
        _refuse_other(loaded, trial.folder)
    trials = []
    for loaded, trial in planned:
        if not _has_finished(trial.folder):
            problem = _run(run, loaded, trial.folder)
            trial = Trial(trial.method, trial.seed, trial.folder, problem)
        if not trial.problem:
            trial = Trial(trial.method, trial.seed, trial.folder, _incomplete(trial.folder))
        trials.append(trial)
        watch(trial)
    base = baseline or (BASELINE if BASELINE in methods else methods[0])
    found = Comparison(planned[0][0], base, tuple(seeds), tuple(_standings(trials, methods, base)), tuple(trials), out)
    write_whole(out / f"{COMPARISON}.json", json.dumps(found.document(), indent=2, allow_nan=False) + "\n")
    figure = curves(found)
    if figure is not None:
        (out / FIGURES).mkdir(exist_ok=True)
        write(out / FIGURES, [figure])
    write_whole(out / f"{COMPARISON}.md", markdown(found))
    return found


def _home(out: Path, method: str, seed: int) -> Path:
    """Of one run; a method of the user's own is `module:NAME`, and not every file system has colons."""
    return out / method.replace(":", ".") / f"seed-{seed}"


# Running --------------------------------------------------------------------------------------------------------------


def _refuse_unusable(methods: Sequence[str], seeds: Sequence[int], baseline: str | None) -> None:
    if not methods or not seeds:
        raise ValueError(f"methods {list(methods)} and seeds {list(seeds)}: a comparison needs one of each or more")
    for what, given in (("methods", methods), ("seeds", seeds)):
        twice = [one for one in given if list(given).count(one) > 1]
        if twice:
            raise ValueError(f"{what}: {twice[0]} stands there twice; say it once")
    if baseline is not None and baseline not in methods:
        raise ValueError(f"baseline {baseline}: is not among the methods {', '.join(methods)}")


def _refuse_other(scenario: Scenario, folder: Path) -> None:
    """A folder with the run of another scenario than this."""
    path = folder / SCENARIO
    if path.is_file() and path.read_text(encoding="utf-8") != scenario.dumps():
        raise ValueError(f"{folder}: holds a run of another scenario; name another folder for this comparison")


def _has_finished(folder: Path) -> bool:
    results = results_of(folder)
    return results is not None and results["status"] == "finished"


def run_locally(scenario: Scenario, folder: Path, workers: int | None = None, track: str | None = "off") -> Result:
    """On the local engine: anew, or on from where it was stopped; tracked in MLflow unless `track` is off."""
    from grpo_fed.engines.local import LocalFederation

    begun = checkpoint.latest(folder) is not None
    tracker = Tracker.open(track, folder, scenario, resumed=begun, models=False)
    status: Status = "failed"
    with LocalFederation.resumed(folder) if begun else LocalFederation(scenario, folder, workers=workers) as federation:
        try:
            result = federation.run(lambda note: tracker.round(line_of(note)))
            status = "finished"
            return result
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            tracker.close(None if federation.result is None else federation.result.document(), status)


def _run(run: Run, scenario: Scenario, folder: Path) -> str:
    """Why it failed, in a line; empty if it did not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        run(scenario, folder)
    except Exception as error:  # noqa: BLE001 - whatever a run dies of, the others are worth having
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if _has_finished(folder) else "it did not finish"


def _incomplete(folder: Path) -> str:
    """Which clients have no score."""
    history = history_of(folder)
    without = [name for name, score in zip(history.clients, history.after, strict=True) if not np.isfinite(score)]
    if not without:
        return ""
    names = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
    return f"no final return of {names}"


# What came of it ------------------------------------------------------------------------------------------------------


def _standings(trials: Sequence[Trial], methods: Sequence[str], baseline: str) -> Iterator[Standing]:
    counting = {method: [one for one in trials if one.method == method and not one.problem] for method in methods}
    histories = {method: [history_of(one.folder) for one in own] for method, own in counting.items()}
    scores = {method: np.array([one.after for one in own]) for method, own in histories.items()}
    base = scores[baseline]
    for method in methods:
        own, entries, iqm = scores[method], {}, None
        if len(own):
            iqm = estimate(interquartile_mean, own, generator=np.random.default_rng(0))
            of = np.array(histories[method][0].entries)
            entries = {entry: float(own[:, of == entry].mean()) for entry in dict.fromkeys(of.tolist())}
        better = by_seed = None
        if method != baseline and len(own) and len(base):
            better = _improvement(own, base, together=False)
            by_seed = _improvement(own, base, together=True)
        verdict = "" if method == baseline else verdict_of(better, by_seed, min(len(own), len(base)))
        seeds = tuple(one.seed for one in counting[method])
        yield Standing(method, seeds, own, iqm, entries, better, by_seed, verdict)


def _improvement(ours: np.ndarray, theirs: np.ndarray, together: bool) -> Estimate:
    draws = np.random.default_rng(0)
    return estimate(probability_of_improvement, ours, theirs, generator=draws, together=together)


def verdict_of(better: Estimate | None, by_seed: Estimate | None, seeds: int) -> str:
    """What may be said of a method against the baseline, from both intervals and the fewer seeds of the two."""
    if better is None or by_seed is None:
        return "no scores"
    if seeds < 2:
        return "one seed cannot tell"
    if min(better.low, by_seed.low) > 0.5:
        return "better"
    return "worse" if max(better.high, by_seed.high) < 0.5 else "no difference"


def _document(one: Standing) -> dict[str, Any]:
    return {
        "seeds": list(one.seeds),
        "scores": one.scores.tolist(),
        "iqm": None if one.iqm is None else asdict(one.iqm),
        "entries": dict(one.entries),
        "probability_of_improvement": None if one.better is None else asdict(one.better),
        "probability_of_improvement_by_seed": None if one.better_by_seed is None else asdict(one.better_by_seed),
        "verdict": one.verdict,
    }


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
    for one in found.standings:
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
    left = [f"- `{one.method}`, seed {one.seed}: {one.problem}" for one in found.trials if one.problem]
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
        names = [one.method for one in found.standings if one.verdict == verdict]
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
    if len(found.standings) == 1:
        yield f"{found.baseline} alone."


def _interval(one: Estimate | None, show: Callable[[float], str]) -> str:
    return "-" if one is None else f"{show(one.value)} [{show(one.low)}, {show(one.high)}]"


# Curves ---------------------------------------------------------------------------------------------------------------


def curves(found: Comparison) -> Drawing | None:
    """All methods' training returns by round, and where the final policies came to; None if nobody has scores."""
    shown = [one for one in found.standings if one.iqm is not None]
    if not shown:
        return None
    lines = {one.method: _curve(found, one) for one in shown}
    caption = (
        "Left: training episodes by round, mean of the middle half over clients and seeds, with its 95 % stratified"
    )
    caption += " bootstrap interval. Right: the final policies with their likeliest actions."
    order = {one.method: place for place, one in enumerate(found.standings)}

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


def _curve(found: Comparison, one: Standing) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rounds, interquartile mean and interval, [R] each; a run that stopped early stays where it was."""
    histories = [history_of(_home(found.out, one.method, seed)) for seed in one.seeds]
    longest = max(len(history.lines) for history in histories)
    returns = np.full((longest, len(histories), len(found.clients)), np.nan)
    for place, history in enumerate(histories):
        returns[: len(history.lines), place] = history.returns
    returns = filled(returns)
    known = np.flatnonzero(np.isfinite(returns).all(axis=(1, 2)))
    draws = np.random.default_rng(0)
    value = interquartile_mean(returns[known]) if len(known) else np.zeros(0)  # episodes longer than all rounds
    bands = [
        np.quantile(interquartile_mean(stratified_resamples(returns[r], draws, RESAMPLES)), [0.025, 0.975])
        for r in known
    ]
    low, high = np.array(bands).reshape(-1, 2).T
    return known + 1, value, low, high
