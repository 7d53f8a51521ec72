"""Whether sharing pays where samples are scarce: the six poles of `poles`, with 15,360 steps each and with 61,440.

The smaller budget comes in rounds of one batch of 256 steps, as in the scenario, and in rounds of 1,024, also one
batch. Between the two the size of a batch differs as well as how often clients meet, so they do not tell which of these
matters; what clients learn alone differs too. A run counts by its mean return, once of the training episodes of all
rounds and once of the episodes played without learning after every 1,024 steps, or 4,096 of the greater budget. Methods
are compared seed by seed: the difference to `local` with its 95 % bootstrap interval, in which a seed keeps its own
pair.

    python -m benchmarks.scarce --seeds 10 --jobs 2

Every finished run appends a JSON line to benchmarks/results/scarce.jsonl and is not run again.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from benchmarks.trials import RESULTS, Run, Trial, add_arguments, of, read_runs, run_all
from grpo_fed.statistics import Estimate, estimate

SCENARIO = "poles"
CONTROL = "local"
METHODS = ("local", "fedavg", "grpo")
BUDGETS: Mapping[str, tuple[str, ...]] = {
    "60 x 256": ("rounds=60", "steps=256", "rollout.horizon=32", "evaluate.every=4"),
    "15 x 1,024": ("rounds=15", "steps=1024", "rollout.horizon=128", "evaluate.every=1"),
    "240 x 256": ("rounds=240", "steps=256", "rollout.horizon=32", "evaluate.every=16"),
}
"""Rounds and steps of each client in a round, and what makes them so."""
PLAYED = ("evaluate.episodes=10",)
FILE = RESULTS / "scarce.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, FILE, 10, METHODS)
    known = {name.partition(" ")[0]: name for name in BUDGETS}
    parser.add_argument("--rounds", default=",".join(known), help=f"comma-separated; default: {','.join(known)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.rounds.split(",")) - set(known):
        raise ValueError(f"--rounds: no {sorted(unknown)}; there are {sorted(known)}")
    budgets = [known[each] for each in arguments.rounds.split(",")]
    planned = trials(arguments.seeds, arguments.methods.split(","), budgets)
    print("\n".join(lines(run_all(planned, arguments.results, arguments.jobs))))


def trials(seeds: int, methods: Iterable[str] = METHODS, budgets: Iterable[str] = tuple(BUDGETS)) -> list[Trial]:
    return [
        Trial(SCENARIO, method, seed, (*BUDGETS[budget], *PLAYED), budget)
        for budget in budgets
        for method in methods
        for seed in range(seeds)
    ]


def finished(seeds: int = 100) -> list[Run]:
    """The runs that there are."""
    return of(trials(seeds), read_runs(FILE)) if FILE.exists() else []


def lines(runs: Sequence[Run]) -> Iterator[str]:
    """A row for each budget and method."""
    if not runs:
        return
    yield f"| rounds x steps | method | in training | more than {CONTROL} | played | more than {CONTROL} | seeds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for budget in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == budget]
        control = [run for run in own if run.method == CONTROL]
        for method in dict.fromkeys(run.method for run in own):
            of_it = [run for run in own if run.method == method]
            cells = []
            for figure in (training, played):
                cells.append(interval(spread(figure(run) for run in of_it)))
                pairs = [] if method == CONTROL else list(paired(of_it, control))
                cells.append(interval(gained(pairs, figure), "+") if pairs else "")
            yield f"| {budget} | {method} | {' | '.join(cells)} | {len(of_it)} |"


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
