"""Measure whether learned groups find which inputs clients cannot share, beside departures block by block.

Six carts as in `scenarios/grouped-sensors.toml`, two of which have the velocities of the cart and of the pole wired the
other way round: of the first layer they cannot share the weights of two sensors, and can share the other two and the
bias. Rows: a block is one group, and groups of all shared blocks are learned; then the same at half and at twice the
learning rate.

    python -m benchmarks.learned_groups

Every finished run appends a JSON line to benchmarks/results/learned_groups.jsonl and is not repeated. The seeds, 1600
to 1609, and 1610 to 1612 at the other learning rates, were fixed beforehand; the case was chosen on seed 0.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS, Trial  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import grpo_fed
from grpo_fed.runs.statistics import estimate

SEEDS, RATE_SEEDS = range(1600, 1610), range(1610, 1613)
FILE = RESULTS / "learned_groups.jsonl"
ENV = "env = 'grpo_fed/CartPole-v1'"
CLIENTS = (
    f"clients=[{{ name = 'cart', count = 4, {ENV} }},"
    f" {{ name = 'rewired', count = 2, {ENV}, kwargs = {{ permute = [0, 3, 2, 1] }} }}]"
)
KINDS = {
    "block": 'policy.groups={ "*" = "block" }',
    "learned": 'policy.groups={ "*" = "learned" }',
}
"""What each row of a table changes in the scenario."""
RATES: dict[str, tuple[str, ...]] = {
    "": (),
    ", half the learning rate": ("objective.learning_rate=1.25e-3",),
    ", twice the learning rate": ("objective.learning_rate=5e-3",),
}
"""What each table changes, by what it adds to the names of its rows."""
SENSORS = tuple(f"torso.0.weight:columns[{sensor}]" for sensor in (1, 3))
"""The units that the rewired carts cannot share."""


@dataclass(frozen=True)
class GroupsRun:
    """One finished run: a line of the results file."""

    kind: str
    """A key of `KINDS`, with one of `RATES`."""
    seed: int
    settings: str
    """`Trial.settings`."""
    left: Mapping[str, Mapping[str, int]]
    """By client, the groups that it does not share at the end, and the round in which it left each."""
    after: Mapping[str, float | None]
    """Final returns."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="", help="comma-separated; default: 1600 to 1612")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else (*SEEDS, *RATE_SEEDS)
    for kind, trial in plan_trials(seeds):
        if trial.settings not in {run.settings for run in read_runs(arguments.results)}:
            run = make_run(kind, trial)
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(f"{kind} seed {trial.seed}: left {run.left}, {run.seconds} s", flush=True)
    print("\n".join(format_tables(select_runs(read_runs(arguments.results)))))


def plan_trials(seeds: Iterable[int] = (*SEEDS, *RATE_SEEDS)) -> Iterator[tuple[str, Trial]]:
    """List the runs, each with its name in a table."""
    for seed in seeds:
        for rate, changes in RATES.items():
            if bool(rate) == (seed in RATE_SEEDS):
                for kind, groups in KINDS.items():
                    yield kind + rate, Trial("grouped-sensors", "grpo", seed, (CLIENTS, groups, *changes), kind + rate)


def make_run(kind: str, trial: Trial) -> GroupsRun:
    """Make a run in this process."""
    began = time.perf_counter()
    result = grpo_fed.run(trial.load(), workers=0)
    return GroupsRun(
        kind,
        trial.seed,
        trial.settings,
        {
            name: {group: departure.round for group, departure in client.departures.items()}
            for name, client in result.clients.items()
            if client.departures
        },
        {name: client.after for name, client in result.clients.items()},
        round(time.perf_counter() - began, 2),
    )


def read_runs(path: Path = FILE) -> list[GroupsRun]:
    """Read all runs of a results file."""
    if not path.exists():
        return []
    return [GroupsRun(**json.loads(line)) for line in path.read_text().splitlines()]


def select_runs(runs: Sequence[GroupsRun], seeds: Iterable[int] = (*SEEDS, *RATE_SEEDS)) -> list[GroupsRun]:
    """Select the runs with the present settings."""
    wanted = {trial.settings for _, trial in plan_trials(seeds)}
    return [run for run in runs if run.settings in wanted]


def format_tables(runs: Sequence[GroupsRun]) -> Iterator[str]:
    """Write a table for each learning rate."""
    for rate in RATES:
        chosen = [run for run in runs if run.kind in {kind + rate for kind in KINDS}]
        if chosen:
            if rate:
                seeds = sorted({run.seed for run in chosen})
                yield from ("", f"At {rate.removeprefix(', ')} (seeds {seeds[0]} to {seeds[-1]}):", "")
            yield from format_table(chosen, rate)


def format_table(runs: Sequence[GroupsRun], rate: str = "") -> Iterator[str]:
    """Write a row for each kind of groups at a learning rate, a key of `RATES`."""
    yield "| groups | exactly these | these and others | a part | others | none | straight out | straight | rewired |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for kind in KINDS:
        chosen = [run for run in runs if run.kind == kind + rate]
        found = [judge(run.left.get(name, {})) for run in chosen for name in run.after if name.startswith("rewired")]
        counts = [str(found.count(word)) for word in ("exactly", "more", "part", "other", "none")]
        returns = [_returns(chosen, prefix) for prefix in ("cart", "rewired")]
        carts = sum(name.startswith("cart") for run in chosen for name in run.after)
        wrong = f"{count_wrong(chosen)} of {carts}"
        yield f"| {kind} | {' | '.join([*counts, wrong, *returns])} |"
    gains = differences(runs)
    if len(gains) > 1:
        gain = estimate(_mean, gains[:, None], generator=np.random.default_rng(0))
        yield ""
        yield (
            f"The rewired carts' return with learned groups less that with blocks, by seed: {gain.value:+.0f}"
            f" [{gain.low:+.0f}, {gain.high:+.0f}], in {int((gains < 0).sum())} of {len(gains)} seeds below 0."
        )


def judge(left: Iterable[str]) -> str:
    """Name what a rewired cart has left, beside what it cannot share; the whole layer has that and more."""
    left, planted = {*left}, {*SENSORS}
    if not left:
        return "none"
    if left == planted:
        return "exactly"
    if planted <= left or "torso.0" in left:
        return "more"
    return "part" if left & planted else "other"


def differences(runs: Sequence[GroupsRun]) -> np.ndarray:
    """Compute, seed by seed, the mean return of the rewired carts with learned groups less that with blocks, [S]."""
    means = {
        (run.kind, run.seed): float(
            np.mean([score for name, score in run.after.items() if score is not None and name.startswith("rewired")])
        )
        for run in runs
    }
    learned, block = (
        {seed: mean for (kind, seed), mean in means.items() if kind.startswith(name)} for name in ("learned", "block")
    )
    return np.array([learned[seed] - block[seed] for seed in sorted(learned.keys() & block.keys())])


def count_wrong(runs: Sequence[GroupsRun]) -> int:
    """Count the straight carts that have left something at the end."""
    return sum(bool(run.left.get(name)) for run in runs for name in run.after if name.startswith("cart"))


def _mean(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean((-2, -1)))


def _returns(runs: Sequence[GroupsRun], prefix: str) -> str:
    """Write the mean and the lowest return of the clients whose names begin so."""
    scores = [
        score for run in runs for name, score in run.after.items() if score is not None and name.startswith(prefix)
    ]
    return f"{sum(scores) / len(scores):.0f}, {min(scores):.0f}" if scores else ""


if __name__ == "__main__":
    main()
