"""Whether sharing pays where samples are scarce: the six poles of `poles`, with 15,360 steps each and with 61,440.

Beside the scenario as it ships there are rows that change one thing each: the learning rate, the epochs, whether
clients meet after every batch of 256 steps or after four, whether these four are one batch of 1,024. A run counts by
its mean return, once of the training episodes of all rounds and once of the episodes played without learning after
every 1,024 steps, or 4,096 of the greater budget. Methods are compared seed by seed: the difference to `local` with its
95 % bootstrap interval, in which a seed keeps its own pair.

The scenario was chosen on the seeds 100 to 107. The seeds here, 200 to 209, were fixed before any of them was run, and
all rows have the same.

    python -m benchmarks.scarce --seeds 10 --jobs 2

Every finished run appends a JSON line to benchmarks/results/scarce.jsonl and is not run again.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from benchmarks.trials import RESULTS, Run, Trial, add_arguments, of, read_runs, run_all
from grpo_fed.runs.statistics import Estimate, estimate

SCENARIO = "poles"
CONTROL = "local"
METHODS = ("local", "fedavg", "grpo")
MEET_OFTEN = ("rounds=60", "steps=256", "rollout.horizon=32", "evaluate.every=4")
MEET_SELDOM = ("rounds=15", "steps=1024", "evaluate.every=1")
ROWS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "shipped": ("60 x 256", MEET_OFTEN),
    "rate": ("60 x 256, half the learning rate", (*MEET_OFTEN, "objective.learning_rate=2.5e-3")),
    "epochs": ("60 x 256, 10 epochs", (*MEET_OFTEN, "objective.epochs=10")),
    "seldom": ("15 x 1,024 in batches of 256", (*MEET_SELDOM, "rollout.horizon=32")),
    "large": ("15 x 1,024 in one batch", (*MEET_SELDOM, "rollout.horizon=128")),
    "more": ("240 x 256", ("rounds=240", "steps=256", "rollout.horizon=32", "evaluate.every=16")),
}
"""Rounds and steps of each client in a round, and what makes them so."""
FIRST = 200
"""The first of the seeds."""
PLAYED = ("evaluate.episodes=10",)
FILE = RESULTS / "scarce.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, FILE, 10, METHODS, FIRST)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated; default: {','.join(ROWS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    planned = trials(arguments.seeds, arguments.methods.split(","), arguments.rows.split(","))
    print("\n".join(lines(run_all(planned, arguments.results, arguments.jobs))))


def trials(seeds: int, methods: Iterable[str] = METHODS, rows: Iterable[str] = tuple(ROWS)) -> list[Trial]:
    return [
        Trial(SCENARIO, method, seed, (*settings, *PLAYED), label)
        for label, settings in (ROWS[row] for row in rows)
        for method in methods
        for seed in range(FIRST, FIRST + seeds)
    ]


def finished(seeds: int = 100) -> list[Run]:
    """The runs that there are."""
    return of(trials(seeds), read_runs(FILE)) if FILE.exists() else []


def lines(runs: Sequence[Run]) -> Iterator[str]:
    """A line for each row and method."""
    if not runs:
        return
    yield f"| rounds x steps | method | in training | more than {CONTROL} | played | more than {CONTROL} | seeds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for label in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == label]
        control = [run for run in own if run.method == CONTROL]
        for method in dict.fromkeys(run.method for run in own):
            of_it = [run for run in own if run.method == method]
            cells = []
            for figure in (training, played):
                cells.append(interval(spread(figure(run) for run in of_it)))
                pairs = [] if method == CONTROL else list(paired(of_it, control))
                cells.append(interval(gained(pairs, figure), "+") if pairs else "")
            yield f"| {label} | {method} | {' | '.join(cells)} | {len(of_it)} |"


def interval(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.0f} [{found.low:{sign}.0f}, {found.high:{sign}.0f}]"


# What a run's rounds say ---------------------------------------------------------------------------------------------


def training(run: Run) -> float:
    """Mean over rounds and clients of the training episodes' mean return; a round without an episode is left out."""
    return _mean(run.returns)


def played(run: Run) -> float:
    """The same of the episodes played."""
    return _mean(run.scores)


def _mean(by_client: Mapping[str, Sequence[float | None]]) -> float:
    return float(np.mean([np.mean([value for value in rounds if value is not None]) for rounds in by_client.values()]))


def paired(runs: Sequence[Run], control: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """With the control's of the same seed, where both are done."""
    other = {run.seed: run for run in control}
    return ((run, other[run.seed]) for run in runs if run.seed in other)


def gained(pairs: Sequence[tuple[Run, Run]], figure) -> Estimate:
    """The mean difference of the pairs."""
    return spread(figure(run) - figure(other) for run, other in pairs)


def spread(values: Iterable[float]) -> Estimate:
    """Mean and interval."""
    return estimate(_seeds_mean, np.array(list(values))[:, None], generator=np.random.default_rng(0))


def _seeds_mean(scores: np.ndarray) -> np.ndarray:
    """[..., S, 1] -> [...]."""
    return scores.mean(axis=(-2, -1))


if __name__ == "__main__":
    main()
