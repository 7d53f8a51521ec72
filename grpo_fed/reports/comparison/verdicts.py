"""Which methods differ from the baseline, and how sure that is with a handful of seeds.

Scores are the final policies' mean returns with deterministic actions, [S, K]: seed, client. The interquartile mean, of
normalised scores where environments are unlike, and the probability of improvement are those of arXiv 2108.13264, with
its stratified bootstrap, where a client is a task.
That bootstrap treats the clients of a seed as independent, and clients that share blocks are not: one lucky run lifts
all of them. So a difference is claimed only if an interval from resampling whole seeds shows it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fed.runs.history import History, read_history
from grpo_fed.runs.statistics import Estimate, estimate, interquartile_mean, probability_of_improvement
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.scores import are_known, scales_of


@dataclass(frozen=True)
class ComparedRun:
    """A run of one method with one seed."""

    method: str
    seed: int
    folder: Path
    problem: str = ""
    """Why its scores do not count; empty if they do."""


@dataclass(frozen=True, eq=False)
class MethodResult:
    """The result of a method over its seeds."""

    method: str
    seeds: tuple[int, ...]
    """[S]: seeds whose scores count."""
    scores: np.ndarray
    """[S, K]."""
    iqm: Estimate | None
    """Interquartile mean of the scores, normalised where environments are unlike; None without any."""
    entries: Mapping[str, float]
    """Mean score of the clients of each of the scenario's entries, over clients and seeds; before they are adapted."""
    better: Estimate | None
    """Probability that a seed of the method beats one of the baseline on the same client; None for the baseline."""
    better_by_seed: Estimate | None
    """The same probability, with an interval from resampling whole seeds."""
    verdict: str
    """`better`, `worse`, `no difference`, or why there is no verdict; empty for the baseline."""
    adaptation: np.ndarray | None = None
    """[S, H, U + 1]: returns of the last policies after so many local updates, from 0, of the clients that take no part
    in training, or of all if there are none; normalised as `iqm` is. None without `evaluate.adapt`."""

    def adapted(self, updates: int) -> Estimate | None:
        """Estimate the interquartile mean of the returns after so many local updates; None if none were made.

        Its interval is from resampling whole seeds, since all clients of a seed begin with one policy.
        """
        if self.adaptation is None:
            return None
        scores, generator = self.adaptation[:, :, updates], np.random.default_rng(0)
        return estimate(interquartile_mean, scores, generator=generator, whole_seeds=True)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side. Clients that take no part in training count in no score but those of adaptation."""

    scenario: Scenario
    """The first method's scenario; the others differ in method, seed, and the values that follow from these."""
    baseline: str
    seeds: tuple[int, ...]
    methods: tuple[MethodResult, ...]
    runs: tuple[ComparedRun, ...]
    out: Path
    """The folder of all runs and of the comparison's files."""

    @property
    def clients(self) -> tuple[str, ...]:
        """[K]: names of the clients that take part in training."""
        return tuple(name for settings in self.scenario.clients if settings.trains for name in settings.names)

    @property
    def score_name(self) -> str:
        """What is compared: `return`, or where environments are unlike `normalised score`."""
        return "normalised score" if scales_of(self.scenario) else "return"

    def document(self) -> dict[str, Any]:
        """Return the contents of `comparison.json`."""
        return {
            "scenario": self.scenario.name,
            **({"iqm_of": self.score_name} if scales_of(self.scenario) else {}),
            "baseline": self.baseline,
            "seeds": list(self.seeds),
            "clients": list(self.clients),
            "methods": {method.method: _document(method) for method in self.methods},
            "left_out": [
                {"method": run.method, "seed": run.seed, "why": run.problem} for run in self.runs if run.problem
            ],
        }


def method_results(runs: Sequence[ComparedRun], methods: Sequence[str], baseline: str) -> Iterator[MethodResult]:
    """Compute the result of every method from the folders of its runs."""
    counted = {method: [run for run in runs if run.method == method and not run.problem] for method in methods}
    histories = {method: [read_history(run.folder) for run in counted[method]] for method in methods}
    returns = {method: np.array([history.after for history in histories[method]]) for method in methods}
    scores = {
        method: returns[method][:, histories[method][0].trains] if len(returns[method]) else returns[method]
        for method in methods
    }
    for method in methods:
        ours, theirs = scores[method], scores[baseline]
        entries, iqm, better, better_by_seed, adaptation = {}, None, None, None, None
        if len(ours):
            comparable = normalise_clients(histories[method][0], ours)
            if comparable is not None:
                iqm = estimate(interquartile_mean, comparable, generator=np.random.default_rng(0))
            entry_of_client = np.array(histories[method][0].entries)
            for entry in dict.fromkeys(entry_of_client.tolist()):
                entries[entry] = float(returns[method][:, entry_of_client == entry].mean())
            if histories[method][0].scenario.evaluate.adapt:
                adapts = histories[method][0].adapts
                returns_by_update = np.array([history.adapted_last[adapts].T for history in histories[method]])
                curves = normalise_clients(histories[method][0], returns_by_update, adapts)  # [S, U + 1, H]
                adaptation = None if curves is None else curves.transpose(0, 2, 1)
        if method != baseline and len(ours) and len(theirs):
            better = _estimate_improvement(ours, theirs, whole_seeds=False)
            better_by_seed = _estimate_improvement(ours, theirs, whole_seeds=True)
        verdict = "" if method == baseline else decide_verdict(better, better_by_seed, min(len(ours), len(theirs)))
        seeds = tuple(run.seed for run in counted[method])
        yield MethodResult(method, seeds, ours, iqm, entries, better, better_by_seed, verdict, adaptation)


def normalise_clients(history: History, returns: np.ndarray, selected: np.ndarray | None = None) -> np.ndarray | None:
    """Make returns comparable, [..., k] -> [..., k]: as they are in one environment, else normalised scores.

    selected: [K] bool, which clients the returns are of; None for those that train. None where a scale is not known.
    """
    selected = history.trains if selected is None else selected
    scales = scales_of(history.scenario)
    if not scales:
        return returns
    if not are_known(scales.values()):
        return None
    of_client = [scales[history.entries[k]] for k in np.flatnonzero(selected)]
    return np.stack([scale.normalise(returns[..., k]) for k, scale in enumerate(of_client)], axis=-1)


def _estimate_improvement(ours: np.ndarray, theirs: np.ndarray, whole_seeds: bool) -> Estimate:
    generator = np.random.default_rng(0)
    return estimate(probability_of_improvement, ours, theirs, generator=generator, whole_seeds=whole_seeds)


def decide_verdict(better: Estimate | None, better_by_seed: Estimate | None, seeds: int) -> str:
    """Decide how a method compares with the baseline.

    A difference needs both intervals on the same side of 0.5. seeds: how many the method with fewer seeds has.
    """
    if better is None or better_by_seed is None:
        return "no scores"
    if seeds < 2:
        return "one seed cannot tell"
    if min(better.low, better_by_seed.low) > 0.5:
        return "better"
    return "worse" if max(better.high, better_by_seed.high) < 0.5 else "no difference"


def _document(method: MethodResult) -> dict[str, Any]:
    """Return a method's part of `comparison.json`."""
    return {
        "seeds": list(method.seeds),
        "scores": method.scores.tolist(),
        "iqm": None if method.iqm is None else asdict(method.iqm),
        "entries": dict(method.entries),
        "probability_of_improvement": None if method.better is None else asdict(method.better),
        "probability_of_improvement_by_seed": None if method.better_by_seed is None else asdict(method.better_by_seed),
        "verdict": method.verdict,
        **({} if method.adaptation is None else {"adaptation": _adaptation_document(method.adaptation)}),
    }


def _adaptation_document(adaptation: np.ndarray) -> dict[str, Any]:
    """Return the curves of a method's adaptation, [S, H, U + 1], and their interquartile mean, as JSON."""
    curve = [float(interquartile_mean(adaptation[:, :, updates])) for updates in range(adaptation.shape[2])]
    return {"curve": curve, "returns": adaptation.tolist()}
