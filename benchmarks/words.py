"""Measure federated language models: who leaves what in `dialects`, and what sharing gives in `scarce-words`.

In `dialects` one of six clients is paid for the opposite answers to the prompts of three others. It should leave
what decides the order, and nobody else should leave anything. The shipped scenario is run with ten seeds, and so is
half the learning rate, in as many rounds and in twice as many; the learning rate is doubled, and rounds are of 2, 4 and
16 updates instead of 8, with three. In `scarce-words` every client has 64 completions a round; methods are compared
seed by seed.

    python -m benchmarks.words --jobs 2

The scenarios were chosen on the seeds 100 to 103. The seeds here, from 200 on, were fixed before the first run. Every
finished run appends a JSON line to benchmarks/results/words.jsonl and is not repeated.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks.scarce import estimate_mean
from benchmarks.trials import RESULTS, Run, Trial, read_runs, run_all
from grpo_fed.runs.statistics import Estimate

FIRST_SEED, SEEDS, FEW_SEEDS = 200, 10, 3
METHODS = ("local", "fedavg", "grpo")
CONTRARY = "down"
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "half the learning rate": ("objective.learning_rate=1e-3",),
    "half the learning rate, twice the rounds": ("objective.learning_rate=1e-3", "rounds=32"),
    "twice the learning rate": ("objective.learning_rate=4e-3",),
    "2 updates a round": ("steps=128", "rounds=64"),
    "4 updates a round": ("steps=256", "rounds=32"),
    "16 updates a round, twice the completions": ("steps=1024",),
}
"""The label of each variant of `dialects`, and its overrides. Those of half the rate have all seeds."""
ALONE = "local at a fifth of the learning rate"
"""A variant of `scarce-words`: of the rates tried on other seeds, the one at which a client alone does best."""
FILE = RESULTS / "words.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process with one thread")
    parser.add_argument("--results", type=type(FILE), default=FILE)
    arguments = parser.parse_args()
    run_all(plan_trials(), arguments.results, arguments.jobs)
    print("\n".join(format_tables(read_runs(arguments.results))))


def plan_trials() -> list[Trial]:
    """Plan all runs, the most telling ones first."""
    seeds = range(FIRST_SEED, FIRST_SEED + SEEDS)
    shipped = [Trial("dialects", method, seed) for seed in seeds for method in ("grpo", "fedavg")]
    shipped += [Trial("scarce-words", method, seed) for seed in seeds for method in METHODS]
    variants = [
        Trial("dialects", "grpo", seed, overrides, label)
        for label, overrides in VARIANTS.items()
        for seed in (seeds if label.startswith("half") else seeds[:FEW_SEEDS])
    ]
    alone = [Trial("scarce-words", "local", seed, ("objective.learning_rate=1e-3",), ALONE) for seed in seeds]
    control = [Trial("dialects", "local", seed) for seed in seeds]
    return shipped + alone + variants + control


def format_tables(runs: Sequence[Run]) -> Iterator[str]:
    """Write the tables of both scenarios, with 95 % bootstrap intervals over seeds."""
    planned = {trial.settings for trial in plan_trials()}
    runs = [run for run in runs if run.settings in planned]
    dialects = [run for run in runs if run.scenario == "dialects"]
    if dialects:
        yield "| `dialects` | method | up | rev | down (contrary) | down leaves in round | others out | seeds |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        for label, method in [("", name) for name in METHODS] + [(label, "grpo") for label in VARIANTS]:
            same = [run for run in dialects if run.variant == label and run.method == method]
            if same:
                yield "| " + " | ".join(_dialects_row(label or "as it ships", method, same)) + " |"
        yield ""
    scarce = [run for run in runs if run.scenario == "scarce-words"]
    if scarce:
        yield "| `scarce-words` | up | rev | up, beyond local | rev, beyond local | seeds |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for label in (*METHODS, ALONE):
            same = [run for run in scarce if (run.variant or run.method) == label]
            if same:
                yield "| " + " | ".join(_scarce_row(label, same, scarce)) + " |"


def _dialects_row(label: str, method: str, runs: Sequence[Run]) -> list[str]:
    leaving = [_first_departure(run, CONTRARY) for run in runs]
    known = sorted(round for round in leaving if round is not None)
    when = f"{known[0]} to {known[-1]}" if known else "never"
    missing = len(leaving) - len(known)
    return [
        label,
        method,
        *(_format(estimate_mean([_final(run, name) for run in runs])) for name in ("up", "rev", CONTRARY)),
        when + (f" ({missing} never)" if known and missing else ""),
        f"{100 * np.mean([_share_out(run) for run in runs]):.2f} %",
        str(len(runs)),
    ]


def _scarce_row(label: str, runs: Sequence[Run], all_runs: Sequence[Run]) -> list[str]:
    control = {run.seed: run for run in all_runs if run.method == "local" and not run.variant}
    cells = [label, *(_format(estimate_mean([_final(run, name) for run in runs])) for name in ("up", "rev"))]
    for name in ("up", "rev"):
        pairs = [_final(run, name) - _final(control[run.seed], name) for run in runs if run.seed in control]
        cells.append("" if label == "local" or not pairs else _format(estimate_mean(pairs), sign=True))
    return [*cells, str(len(runs))]


def _final(run: Run, entry: str) -> float:
    """The mean of the last evaluation of an entry's clients."""
    scores = [scores[-1] for name, scores in run.scores.items() if name.partition("-")[0] == entry]
    return float(np.mean([score for score in scores if score is not None]))


def _first_departure(run: Run, client: str) -> int | None:
    """The round in which a client first leaves something."""
    return next((number for number, groups in enumerate(run.personal[client], 1) if groups), None)


def _share_out(run: Run) -> float:
    """The share of (client, block, round) in which another client than the contrary one is out of a part of a block."""
    blocks = max(1, len(set(run.groups.values())))  # none where nothing is shared
    others = [rounds for name, rounds in run.personal.items() if name != CONTRARY]
    out = [len({run.groups[group] for group in groups}) / blocks for rounds in others for groups in rounds]
    return float(np.mean(out))


def _format(value: Estimate, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


if __name__ == "__main__":
    main()
