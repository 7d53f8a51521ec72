"""Measure whether sharing helps where samples are scarce: the six poles of `poles`, with 15,360 or 61,440 steps.

Beside the scenario as it ships, each further row changes one thing: the learning rate, the epochs, whether a round
comes after every batch of 256 steps or after four, whether these four are one batch of 1,024. A run is
measured by its mean return: once of the training episodes of all rounds, and once of the evaluations after every 1,024
steps, or 4,096 with the larger budget. Methods are compared seed by seed: the difference to `local` with its
95 % bootstrap interval, computed over the pairs of runs with the same seed.

The scenario was chosen on the seeds 100 to 107. The seeds here, 200 to 209, were fixed before the first run, and are
the same in all rows.

    python -m benchmarks.scarce --seeds 10 --jobs 2

Every finished run appends a JSON line to benchmarks/results/scarce.jsonl and is not repeated.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from benchmarks.trials import RESULTS, Run, Trial, add_arguments, read_runs, run_all, select_runs
from grpo_fed.runs.statistics import Estimate, estimate

SCENARIO = "poles"
CONTROL = "local"
METHODS = ("local", "fedavg", "grpo")
MANY_ROUNDS = ("rounds=60", "steps=256", "rollout.horizon=32", "evaluate.every=4")
FEW_ROUNDS = ("rounds=15", "steps=1024", "evaluate.every=1")
ROWS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "shipped": ("60 x 256", MANY_ROUNDS),
    "rate": ("60 x 256, half the learning rate", (*MANY_ROUNDS, "objective.learning_rate=2.5e-3")),
    "epochs": ("60 x 256, 10 epochs", (*MANY_ROUNDS, "objective.epochs=10")),
    "seldom": ("15 x 1,024 in batches of 256", (*FEW_ROUNDS, "rollout.horizon=32")),
    "large": ("15 x 1,024 in one batch", (*FEW_ROUNDS, "rollout.horizon=128")),
    "more": ("240 x 256", ("rounds=240", "steps=256", "rollout.horizon=32", "evaluate.every=16")),
}
"""The label of each row (rounds x steps of a client in a round) and its overrides."""
FIRST_SEED = 200
"""The first seed."""
EVALUATION = ("evaluate.episodes=10",)
FILE = RESULTS / "scarce.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, FILE, 10, METHODS, FIRST_SEED)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated; default: {','.join(ROWS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    planned = plan_trials(arguments.seeds, arguments.methods.split(","), arguments.rows.split(","))
    print("\n".join(format_table(run_all(planned, arguments.results, arguments.jobs))))


def plan_trials(seeds: int, methods: Iterable[str] = METHODS, rows: Iterable[str] = tuple(ROWS)) -> list[Trial]:
    return [
        Trial(SCENARIO, method, seed, (*settings, *EVALUATION), label)
        for label, settings in (ROWS[row] for row in rows)
        for method in methods
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
    ]


def read_finished_runs(seeds: int = 100) -> list[Run]:
    """Read the finished runs."""
    return select_runs(plan_trials(seeds), read_runs(FILE)) if FILE.exists() else []


def format_table(runs: Sequence[Run]) -> Iterator[str]:
    """Write the table, with a line for each row and method."""
    if not runs:
        return
    yield f"| rounds x steps | method | in training | more than {CONTROL} | evaluated | more than {CONTROL} | seeds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for label in dict.fromkeys(run.variant for run in runs):
        runs_of_row = [run for run in runs if run.variant == label]
        control = [run for run in runs_of_row if run.method == CONTROL]
        for method in dict.fromkeys(run.method for run in runs_of_row):
            runs_of_method = [run for run in runs_of_row if run.method == method]
            cells = []
            for figure in (mean_training_return, mean_evaluation_score):
                cells.append(format_estimate(estimate_mean(figure(run) for run in runs_of_method)))
                pairs = [] if method == CONTROL else list(pair_by_seed(runs_of_method, control))
                cells.append(format_estimate(estimate_gain(pairs, figure), "+") if pairs else "")
            yield f"| {label} | {method} | {' | '.join(cells)} | {len(runs_of_method)} |"


def format_estimate(result: Estimate, sign: str = "") -> str:
    return f"{result.value:{sign}.0f} [{result.low:{sign}.0f}, {result.high:{sign}.0f}]"


# Measures of a run ---------------------------------------------------------------------------------------------------


def mean_training_return(run: Run) -> float:
    """Average the returns of training episodes over rounds, then clients; rounds without an episode are left out."""
    return _mean(run.returns)


def mean_evaluation_score(run: Run) -> float:
    """Average the scores of evaluations over rounds, then clients."""
    return _mean(run.scores)


def _mean(by_client: Mapping[str, Sequence[float | None]]) -> float:
    return float(np.mean([np.mean([value for value in rounds if value is not None]) for rounds in by_client.values()]))


def pair_by_seed(runs: Sequence[Run], control: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """Pair each run with the control's run of the same seed, if both are finished."""
    control_runs = {run.seed: run for run in control}
    return ((run, control_runs[run.seed]) for run in runs if run.seed in control_runs)


def estimate_gain(pairs: Sequence[tuple[Run, Run]], figure) -> Estimate:
    """Estimate the mean difference of the pairs."""
    return estimate_mean(figure(run) - figure(control_runs) for run, control_runs in pairs)


def estimate_mean(values: Iterable[float]) -> Estimate:
    """Estimate the mean with its interval."""
    return estimate(_seeds_mean, np.array(list(values))[:, None], generator=np.random.default_rng(0))


def _seeds_mean(scores: np.ndarray) -> np.ndarray:
    """[..., S, 1] -> [...]."""
    return scores.mean(axis=(-2, -1))


if __name__ == "__main__":
    main()
