"""Measure whether the merge detects clients that differ: two of the six clients of `contrary` have swapped actions.

The planted structure is that these two depart from the actor and no client departs from another block. It is compared
with the departed groups after the rounds of the last third, when the merge has had time to detect them. Tables show the
returns of several methods, for the straight and for the contrary clients, and with the rule `clusters` whether the two
contrary clients share an actor with each other alone.

    python -m benchmarks.structure --seeds 5 --jobs 2

Every finished run appends a JSON line to benchmarks/results/structure.jsonl and is not repeated.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.trials import RESULTS, Run, Trial, add_arguments, read_runs, run_all, select_runs
from grpo_fed.runs.statistics import estimate, interquartile_mean

SCENARIO = "contrary"
PLANTED = frozenset({"backwards-0", "backwards-1"})
"""The clients with swapped actions."""
BLOCK = "actor"
"""The block that they should depart from."""
METHODS = ("local", "fedavg", "fedper", "lg", "ditto", "clusters", "grpo")
FIRST_SEED = 200
"""The first seed; fixed before the first run. Lower ones were used to design the merge."""
FILE = RESULTS / "structure.jsonl"


@dataclass(frozen=True)
class Confusion:
    """Counts of (round, client, group)."""

    planted_left: int
    planted_kept: int
    others_left: int
    others_kept: int

    @property
    def recall(self) -> float:
        """Share of the planted departures that were detected."""
        return self.planted_left / max(1, self.planted_left + self.planted_kept)

    @property
    def precision(self) -> float:
        """Share of the detected departures that were planted; 1 if none was detected."""
        counts = self.planted_left + self.others_left
        return self.planted_left / counts if counts else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, FILE, 5, METHODS, FIRST_SEED)
    arguments = parser.parse_args()
    planned = plan_trials(arguments.seeds, arguments.methods.split(","))
    print("\n".join(format_tables(run_all(planned, arguments.results, arguments.jobs))))


def plan_trials(seeds: int, methods: Iterable[str] = METHODS) -> list[Trial]:
    return [Trial(SCENARIO, method, seed) for method in methods for seed in range(FIRST_SEED, FIRST_SEED + seeds)]


def read_finished_runs(seeds: int = 100) -> list[Run]:
    """Read the finished runs."""
    return select_runs(plan_trials(seeds), read_runs(FILE)) if FILE.exists() else []


def format_tables(runs: Sequence[Run]) -> Iterator[str]:
    """Write the tables of returns, of detected departures for all clients and for each, and of clusters."""
    if not runs:
        return
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    yield from format_returns(by_method)
    yield ""
    yield from format_confusion(by_method)
    if runs_of_ours := by_method.get("grpo"):
        yield ""
        yield from format_departures(runs_of_ours)
    if clustered := by_method.get("clusters"):
        share, others = (np.mean([measure(run) for run in clustered]) for measure in (share_together, share_divided))
        yield ""
        yield (
            f"With `clusters`, over the last third of the rounds and {len(clustered)} seeds, the two contrary clients"
            f" shared their {BLOCK} with each other and with no other client in {share:.0%} of the rounds; the other"
            f" blocks were divided in {others:.0%} of theirs."
        )


def format_returns(by_method: dict[str, list[Run]]) -> Iterator[str]:
    yield "| method | straight, evaluated | contrary, evaluated | straight, training | contrary, training | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for method, runs in by_method.items():
        cells = [format_estimate(final_scores(runs, contrary)) for contrary in (False, True)]
        cells += [format_estimate(training_returns(runs, contrary)) for contrary in (False, True)]
        yield f"| {method} | {' | '.join(cells)} | {len(runs)} |"


def format_confusion(by_method: dict[str, list[Run]]) -> Iterator[str]:
    yield "| method | planted, departed | planted, kept | others, departed | others, kept | recall | precision |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for method, runs in by_method.items():
        counts = add_confusions(count_confusion(run) for run in runs)
        if not any(any(any(rounds) for rounds in run.personal.values()) for run in runs):
            continue
        yield (
            f"| {method} | {counts.planted_left} | {counts.planted_kept} | {counts.others_left} | {counts.others_kept}"
            f" | {counts.recall:.0%} | {counts.precision:.0%} |"
        )


def format_departures(runs: Sequence[Run]) -> Iterator[str]:
    """Write in which share of the last third's rounds each client had departed from each group."""
    groups = list(runs[0].groups)
    yield f"| client | {' | '.join(groups)} |"
    yield "| --- |" + " --- |" * len(groups)
    for client in runs[0].personal:
        shares = [
            np.mean([[group in left for left in last_third(run.personal[client])] for run in runs]) for group in groups
        ]
        yield f"| {client} | {' | '.join(f'{share:.0%}' for share in shares)} |"


def format_estimate(scores: np.ndarray) -> str:
    """Write the interquartile mean with its interval."""
    result = estimate(interquartile_mean, scores, generator=np.random.default_rng(0))
    return f"{result.value:.0f} [{result.low:.0f}, {result.high:.0f}]"


# Measures of a run ---------------------------------------------------------------------------------------------------


def count_confusion(run: Run) -> Confusion:
    """Count detected and planted departures over the last third of the rounds."""
    counts = {(planted, left): 0 for planted in (True, False) for left in (True, False)}
    for client, rounds in run.personal.items():
        for departed in last_third(rounds):
            for group, block in run.groups.items():
                counts[client in PLANTED and block == BLOCK, group in departed] += 1
    return Confusion(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def add_confusions(confusions: Iterable[Confusion]) -> Confusion:
    """Add up the counts."""
    every = list(confusions)
    return Confusion(
        sum(counts.planted_left for counts in every),
        sum(counts.planted_kept for counts in every),
        sum(counts.others_left for counts in every),
        sum(counts.others_kept for counts in every),
    )


def share_together(run: Run) -> float:
    """Compute in which share of the last third's rounds the contrary clients were the actor's own cluster."""
    return float(np.mean([any(set(part) == PLANTED for part in round[BLOCK]) for round in last_third(run.clusters)]))


def share_divided(run: Run) -> float:
    """Compute in which share of the last third's rounds the other blocks had more than one cluster."""
    others = [parts for round in last_third(run.clusters) for block, parts in round.items() if block != BLOCK]
    return float(np.mean([len(parts) > 1 for parts in others]))


def final_scores(runs: Sequence[Run], contrary: bool) -> np.ndarray:
    """Collect the return of each seed and client after the last round, with deterministic actions, [S, T]."""
    names = select_clients(runs[0], contrary)
    return np.array([[run.scores[name][-1] for name in names] for run in runs], dtype=float)


def training_returns(runs: Sequence[Run], contrary: bool) -> np.ndarray:
    """Average the returns of the last third's training episodes for each seed and client, [S, T]."""
    names = select_clients(runs[0], contrary)
    return np.array([[np.mean(without_none(last_third(run.returns[name]))) for name in names] for run in runs])


def select_clients(run: Run, contrary: bool) -> list[str]:
    return [name for name in run.personal if (name in PLANTED) == contrary]


def last_third(rounds: Sequence) -> Sequence:
    """Select the last third of the rounds, rounded up."""
    return rounds[len(rounds) - -(-len(rounds) // 3) :]


def without_none(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


if __name__ == "__main__":
    main()
