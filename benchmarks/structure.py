"""Whether the merge finds what was planted: two of the six clients of `contrary` have their actions swapped.

Planted is that these two leave the actor, and that nobody leaves anything else. Found is what clients have left after
the rounds of the last third, when the merge has had time to see it. The returns of several methods stand side by side,
of the straight and of the contrary clients; with `clusters`, whether the two share an actor with each other alone.

    python -m benchmarks.structure --seeds 5 --jobs 2

Every finished run appends a JSON line to benchmarks/results/structure.jsonl and is not run again.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.trials import RESULTS, Run, Trial, add_arguments, of, read_runs, run_all
from grpo_fed.runs.statistics import estimate, interquartile_mean

SCENARIO = "contrary"
PLANTED = frozenset({"backwards-0", "backwards-1"})
"""The clients that are contrary."""
BLOCK = "actor"
"""Where they are."""
METHODS = ("local", "fedavg", "fedper", "lg", "ditto", "clusters", "grpo")
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
        """Share of what was planted that was found."""
        return self.planted_left / max(1, self.planted_left + self.planted_kept)

    @property
    def precision(self) -> float:
        """Share of what was found that was planted; 1 where nothing was found."""
        found = self.planted_left + self.others_left
        return self.planted_left / found if found else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, FILE, 5, METHODS)
    arguments = parser.parse_args()
    planned = trials(arguments.seeds, arguments.methods.split(","))
    print("\n".join(lines(run_all(planned, arguments.results, arguments.jobs))))


def trials(seeds: int, methods: Iterable[str] = METHODS) -> list[Trial]:
    return [Trial(SCENARIO, method, seed) for method in methods for seed in range(seeds)]


def finished(seeds: int = 100) -> list[Run]:
    """The runs that there are."""
    return of(trials(seeds), read_runs(FILE)) if FILE.exists() else []


def lines(runs: Sequence[Run]) -> Iterator[str]:
    """The tables: returns, the confusion, who left what, and what clusters found."""
    if not runs:
        return
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    yield from returns_table(by_method)
    yield ""
    yield from confusion_table(by_method)
    if runs_of_ours := by_method.get("grpo"):
        yield ""
        yield from departures_table(runs_of_ours)
    if clustered := by_method.get("clusters"):
        share, others = (np.mean([one(run) for run in clustered]) for one in (together, divided))
        yield ""
        yield (
            f"With `clusters`, over the last third of the rounds and {len(clustered)} seeds, the two contrary clients"
            f" shared their {BLOCK} with each other and with nobody else in {share:.0%} of the rounds; the other blocks"
            f" were divided in {others:.0%} of theirs."
        )


def returns_table(by_method: dict[str, list[Run]]) -> Iterator[str]:
    yield "| method | straight, played | contrary, played | straight, training | contrary, training | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for method, runs in by_method.items():
        cells = [cell(scores(runs, contrary)) for contrary in (False, True)]
        cells += [cell(training(runs, contrary)) for contrary in (False, True)]
        yield f"| {method} | {' | '.join(cells)} | {len(runs)} |"


def confusion_table(by_method: dict[str, list[Run]]) -> Iterator[str]:
    yield "| method | planted, left | planted, kept | others, left | others, kept | recall | precision |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for method, runs in by_method.items():
        found = total(confusion(run) for run in runs)
        if not any(any(any(rounds) for rounds in run.personal.values()) for run in runs):
            continue
        yield (
            f"| {method} | {found.planted_left} | {found.planted_kept} | {found.others_left} | {found.others_kept}"
            f" | {found.recall:.0%} | {found.precision:.0%} |"
        )


def departures_table(runs: Sequence[Run]) -> Iterator[str]:
    """In how many of the last third's rounds each client had left each group."""
    groups = list(runs[0].groups)
    yield f"| client | {' | '.join(groups)} |"
    yield "| --- |" + " --- |" * len(groups)
    for client in runs[0].personal:
        shares = [np.mean([[group in left for left in last(run.personal[client])] for run in runs]) for group in groups]
        yield f"| {client} | {' | '.join(f'{share:.0%}' for share in shares)} |"


def cell(scores: np.ndarray) -> str:
    """Interquartile mean with its interval."""
    found = estimate(interquartile_mean, scores, generator=np.random.default_rng(0))
    return f"{found.value:.0f} [{found.low:.0f}, {found.high:.0f}]"


# What a run's rounds say ---------------------------------------------------------------------------------------------


def confusion(run: Run) -> Confusion:
    """Found and planted over the last third of the rounds."""
    counts = {(planted, left): 0 for planted in (True, False) for left in (True, False)}
    for client, rounds in run.personal.items():
        for own in last(rounds):
            for group, block in run.groups.items():
                counts[client in PLANTED and block == BLOCK, group in own] += 1
    return Confusion(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def total(confusions: Iterable[Confusion]) -> Confusion:
    """Added up."""
    every = list(confusions)
    return Confusion(
        sum(one.planted_left for one in every),
        sum(one.planted_kept for one in every),
        sum(one.others_left for one in every),
        sum(one.others_kept for one in every),
    )


def together(run: Run) -> float:
    """In what part of the last third's rounds the contrary clients were a cluster of their own in their block."""
    return float(np.mean([any(set(part) == PLANTED for part in round[BLOCK]) for round in last(run.clusters)]))


def divided(run: Run) -> float:
    """In what part of the last third's rounds another block than theirs had more than one cluster."""
    others = [parts for round in last(run.clusters) for block, parts in round.items() if block != BLOCK]
    return float(np.mean([len(parts) > 1 for parts in others]))


def scores(runs: Sequence[Run], contrary: bool) -> np.ndarray:
    """[S, T]: of each seed and client, the return after the last round, with deterministic actions."""
    names = clients(runs[0], contrary)
    return np.array([[run.scores[name][-1] for name in names] for run in runs], dtype=float)


def training(runs: Sequence[Run], contrary: bool) -> np.ndarray:
    """[S, T]: the mean return of the last third's training episodes."""
    names = clients(runs[0], contrary)
    return np.array([[np.mean(known(last(run.returns[name]))) for name in names] for run in runs])


def clients(run: Run, contrary: bool) -> list[str]:
    return [name for name in run.personal if (name in PLANTED) == contrary]


def last(rounds: Sequence) -> Sequence:
    """The last third, rounded up."""
    return rounds[len(rounds) - -(-len(rounds) // 3) :]


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


if __name__ == "__main__":
    main()
