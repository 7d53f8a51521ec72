"""Measure how many steps a curriculum saves: poles of 0.1 to 4 metres, the task of `scenarios/levels.toml`.

Four carts train one policy by `fedavg` on poles whose half-lengths are levels from 0.05 to 2 m. Twenty clients that
take no part in training hold poles of 0.05, ..., 2 m; a pole is solved if four episodes with the likeliest actions
return 475 or more on average. What counts is the number of steps that all carts together have made when an
evaluation, one every two rounds, first has 18 of the 20 poles solved; a run ends there, or after 80 rounds of 4,096
steps without.

    python -m benchmarks.curriculum

The kinds of curriculum are compared with uniform levels, and with carts that have a pole each, spread over the range.
Edges that move by themselves did better on these seeds than the row to be judged, so this row, beside uniform levels,
was run once more, on the seeds 610 to 619, before which nothing was changed.

Every finished run appends a JSON line to benchmarks/results/curriculum.jsonl and is not repeated. The seeds, 600 to
609, were fixed beforehand; the set-up, and `return` by the server as the one to be judged, were chosen on the seeds 0
to 2.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS, Trial  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import grpo_fed
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import estimate

SCENARIO = "levels"
SEEDS, MORE_SEEDS = range(600, 610), range(610, 620)
FILE = RESULTS / "curriculum.jsonl"
SOLVED, NEEDED, SHARE = 475.0, 18, 0.6
"""The return from which a pole is solved, how many have to be, and the part of the uniform levels' steps to stay in."""
UNIFORM, JUDGED, REPEATED = "uniform levels", "return, by the server", "expanding, by the server"
EACH = "clients.0.curriculum"
KINDS: dict[str, tuple[str, ...]] = {
    UNIFORM: (f"{EACH}.kind=uniform",),
    "a pole for each cart": (
        "clients.0={ name = 'cart', count = 4, env = 'grpo_fed/CartPole-v1', spread = { length = [0.05, 2.0] } }",
    ),
    JUDGED: (),
    "return, each cart by itself": ("curriculum.by=client", f"{EACH}.episodes=4"),
    REPEATED: (f"{EACH}.kind=expanding", f"{EACH}.episodes=8"),
    "learnability, by the server": (f"{EACH}.kind=learnability",),
    "schedule": (f"{EACH}.kind=schedule", f"{EACH}.until=0.375"),
    "replay, each cart by itself": ("curriculum.by=client", f"{EACH}.kind=replay"),
}
"""What each row of the table changes in the scenario."""
COMMON = ("rounds=80",)


@dataclass(frozen=True)
class CurriculumRun:
    """One finished run: a line of the results file."""

    kind: str
    """A key of `KINDS`."""
    seed: int
    settings: str
    """`Trial.settings`."""
    solved: Sequence[int]
    """How many poles each evaluation had solved, that before the first round included."""
    steps: int | None
    """Steps of all carts together when enough poles were solved; None if they never were."""
    most: int
    """Steps of a run that is not ended by this."""
    seconds: float


class Solved(Exception):
    """Raised to end a run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="", help="comma-separated; default: 600 to 619")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else (*SEEDS, *MORE_SEEDS)
    for kind, trial in plan_trials(seeds):
        if trial.settings not in {run.settings for run in read_runs(arguments.results)}:
            run = make_run(kind, trial)
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(f"{kind} seed {trial.seed}: {run.steps} steps, {run.seconds} s", flush=True)
    print("\n".join(format_tables(select_runs(read_runs(arguments.results), seeds))))


def plan_trials(seeds: Iterable[int] = (*SEEDS, *MORE_SEEDS)) -> Iterator[tuple[str, Trial]]:
    """List the runs, each with its name in the table."""
    for seed in seeds:
        for kind in (UNIFORM, REPEATED) if seed in MORE_SEEDS else KINDS:
            yield kind, Trial(SCENARIO, "fedavg", seed, (*KINDS[kind], *COMMON), kind)


def make_run(kind: str, trial: Trial) -> CurriculumRun:
    """Make a run in this process, until enough poles are solved."""
    scenario, start = trial.load(), time.perf_counter()
    solved: list[int] = []
    steps: list[int] = []

    def watch(record: RoundRecord) -> None:
        scores = [client.score for client in record.clients if not client.trains and client.score is not None]
        if scores:
            solved.append(sum(score >= SOLVED for score in scores))
            if solved[-1] >= NEEDED:
                steps.append(record.env_steps)
                raise Solved

    with suppress(Solved):
        grpo_fed.run(scenario, watch=watch, workers=0)
    most = scenario.rounds * scenario.steps * scenario.clients[0].count
    seconds = round(time.perf_counter() - start, 2)
    return CurriculumRun(kind, trial.seed, trial.settings, solved, steps[0] if steps else None, most, seconds)


def read_runs(path: Path = FILE) -> list[CurriculumRun]:
    """Read all runs of a results file."""
    if not path.exists():
        return []
    return [CurriculumRun(**json.loads(line)) for line in path.read_text().splitlines()]


def select_runs(runs: Sequence[CurriculumRun], seeds: Iterable[int] = (*SEEDS, *MORE_SEEDS)) -> list[CurriculumRun]:
    """Select the runs with the present settings."""
    wanted = {trial.settings for _, trial in plan_trials(seeds)}
    return [run for run in runs if run.settings in wanted]


# The table -----------------------------------------------------------------------------------------------------------


def steps_by_kind(runs: Sequence[CurriculumRun], kinds: Iterable[str]) -> dict[str, np.ndarray]:
    """Collect the steps [S] of each kind in the seeds that are complete; a run that never got there has all of its."""
    kinds = tuple(kinds)
    of = {(run.kind, run.seed): run for run in runs}
    seeds = [seed for seed in sorted({run.seed for run in runs}) if all((kind, seed) in of for kind in kinds)]
    return {
        kind: np.array([each.most if each.steps is None else each.steps for seed in seeds for each in [of[kind, seed]]])
        for kind in kinds
    }


def mean_ratio(logarithms: np.ndarray) -> np.ndarray:
    """The geometric mean of ratios, from their logarithms [..., S, 1]."""
    return np.asarray(np.exp(logarithms.mean(axis=(-2, -1))))


def format_tables(runs: Sequence[CurriculumRun]) -> Iterator[str]:
    """Write a table of all kinds, and one of those that were run once more."""
    first, more = ([run for run in runs if run.seed in seeds] for seeds in (SEEDS, MORE_SEEDS))
    yield from format_table(first, KINDS)
    if more:
        yield from ("", f"On the seeds {MORE_SEEDS[0]} to {MORE_SEEDS[-1]}:", "")
        yield from format_table(more, (UNIFORM, REPEATED))


def format_table(runs: Sequence[CurriculumRun], kinds: Iterable[str]) -> Iterator[str]:
    """Write a row for each kind: median steps, their spread, and their ratio to uniform levels by seed."""
    steps = steps_by_kind(runs, kinds)
    if not steps[UNIFORM].size:
        return
    yield "| levels of training | median steps | lowest to highest | ratio to uniform levels, by seed | within 0.6 |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for kind, values in steps.items():
        never = sum(run.kind == kind and run.steps is None for run in runs)
        spread = f"{values.min():,} to {values.max():,}" + (f", {never} never" if never else "")
        ratios = values / steps[UNIFORM]
        ratio = estimate(mean_ratio, np.log(ratios)[:, None], generator=np.random.default_rng(0), whole_seeds=True)
        cells = (
            ("1", "")
            if kind == UNIFORM
            else (
                f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                f"{(ratios <= SHARE).sum()} of {ratios.size}",
            )
        )
        yield f"| {kind} | {np.median(values):,.0f} | {spread} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
