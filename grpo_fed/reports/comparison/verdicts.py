"""What a handful of seeds can say of the difference between methods.

Scores are the final policies' mean returns with deterministic actions, [S, K]: a seed, a client. The interquartile mean
and the probability of improvement are those of arXiv 2108.13264, with its stratified bootstrap, for which a client is a
task. That bootstrap takes a seed's clients for independent, and clients that share blocks are not: one lucky run lifts
all of them. So a difference is only called one if whole seeds, drawn together, show it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fed.runs.history import read_history
from grpo_fed.runs.statistics import Estimate, estimate, interquartile_mean, probability_of_improvement
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True)
class ComparedRun:
    """A method with a seed."""

    method: str
    seed: int
    folder: Path
    problem: str = ""
    """Why its scores do not count; empty if they do."""


@dataclass(frozen=True, eq=False)
class MethodResult:
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
    methods: tuple[MethodResult, ...]
    runs: tuple[ComparedRun, ...]
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
            "methods": {one.method: _document(one) for one in self.methods},
            "left_out": [
                {"method": one.method, "seed": one.seed, "why": one.problem} for one in self.runs if one.problem
            ],
        }


def method_results(trials: Sequence[ComparedRun], methods: Sequence[str], baseline: str) -> Iterator[MethodResult]:
    """Of every method, from the run folders of its trials."""
    counting = {method: [one for one in trials if one.method == method and not one.problem] for method in methods}
    histories = {method: [read_history(one.folder) for one in own] for method, own in counting.items()}
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
        yield MethodResult(method, seeds, own, iqm, entries, better, by_seed, verdict)


def _improvement(ours: np.ndarray, theirs: np.ndarray, together: bool) -> Estimate:
    draws = np.random.default_rng(0)
    return estimate(probability_of_improvement, ours, theirs, generator=draws, whole_seeds=together)


def verdict_of(better: Estimate | None, by_seed: Estimate | None, seeds: int) -> str:
    """What may be said of a method against the baseline, from both intervals and the fewer seeds of the two."""
    if better is None or by_seed is None:
        return "no scores"
    if seeds < 2:
        return "one seed cannot tell"
    if min(better.low, by_seed.low) > 0.5:
        return "better"
    return "worse" if max(better.high, by_seed.high) < 0.5 else "no difference"


def _document(one: MethodResult) -> dict[str, Any]:
    return {
        "seeds": list(one.seeds),
        "scores": one.scores.tolist(),
        "iqm": None if one.iqm is None else asdict(one.iqm),
        "entries": dict(one.entries),
        "probability_of_improvement": None if one.better is None else asdict(one.better),
        "probability_of_improvement_by_seed": None if one.better_by_seed is None else asdict(one.better_by_seed),
        "verdict": one.verdict,
    }
