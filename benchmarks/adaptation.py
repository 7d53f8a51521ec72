"""Measure how fast policies adapt to tasks that took no part in training: the newcomers of `scenarios/newcomers.toml`.

Six carts with half-poles of 0.3 to 0.9 m train a shared policy by `reptile`, `perfedavg` or `fedavg`. Four newcomers
with half-poles of 1.4 to 2.0 m then adapt it in 16 local updates of 256 steps. Beside these is a random start, which is
the shared policy before the first round, adapted in the same way, and a veteran: the newcomer as it would be if it had
trained alone for all 40 rounds of 1,024 steps. A newcomer has caught up as soon as it has 90 % of its veteran's return;
4,096 steps are 10 % of the veteran's.

    python -m benchmarks.adaptation

Every finished run appends a JSON line to benchmarks/results/adaptation.jsonl and is not repeated. The seeds, 400 to
409, were fixed beforehand; the lengths of the poles were chosen on the seeds 0 to 4.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS, Trial  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grpo_fed
from grpo_fed.runs.statistics import Estimate, estimate, interquartile_mean

SCENARIO = "newcomers"
SEEDS = range(400, 410)
FILE = RESULTS / "adaptation.jsonl"
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "reptile": ("reptile", ()),
    "perfedavg": ("perfedavg", ()),
    "fedavg": ("fedavg", ()),
    "fedavg, 20 rounds": ("fedavg", ("rounds=20",)),
}
"""What trains the policy that newcomers begin with: method and overrides. The last is a control for `reptile`, which
goes half of `fedavg`'s way in each of its rounds; it was added after the others had been run."""
RANDOM, VETERAN = "random start", "veteran"
VETERANS = ("evaluate.adapt=0", "clients.0.count=2", "clients.1.trains=true")
"""What makes newcomers train by themselves, with `method = "local"`. The others are too few to take long."""
SHARE = 0.9
"""The part of its veteran's return that a newcomer needs to have caught up."""
SHOWN = (0, 1, 4, 8, 16)
"""The numbers of updates after which the table has returns."""


@dataclass(frozen=True)
class AdaptationRun:
    """One finished run: a line of the results file."""

    method: str
    """A key of `METHODS`, or `VETERAN`."""
    seed: int
    settings: str
    """`Trial.settings`."""
    first: Mapping[str, Sequence[float]]
    """By newcomer, returns after so many updates of the policy before the first round; empty for veterans."""
    last: Mapping[str, Sequence[float]]
    """The same of the last policy; a veteran has its final return alone."""
    trained: Mapping[str, float | None]
    """The final returns of the clients that trained the shared policy."""
    update_steps: int
    """The steps of an update."""
    steps: int
    """The steps that each training client, or a veteran, learned from."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="", help="comma-separated; default: 400 to 409")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else SEEDS
    for method, trial in plan_trials(seeds):
        if trial.settings not in {run.settings for run in read_runs(arguments.results)}:
            run = make_run(method, trial)
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(f"{method} seed {trial.seed}: {run.seconds} s", flush=True)
    print("\n".join(format_table(select_runs(read_runs(arguments.results), seeds))))


def plan_trials(seeds: Iterable[int] = SEEDS) -> Iterator[tuple[str, Trial]]:
    """List the runs, each with its name in the table."""
    for seed in seeds:
        yield VETERAN, Trial(SCENARIO, "local", seed, VETERANS, VETERAN)
        for name, (method, overrides) in METHODS.items():
            yield name, Trial(SCENARIO, method, seed, overrides)


def make_run(method: str, trial: Trial) -> AdaptationRun:
    """Make a run in this process."""
    scenario, start = trial.load(), time.perf_counter()
    result = grpo_fed.run(scenario, workers=0)
    newcomers = {name: result.clients[name] for name in scenario.clients[1].names}
    is_veteran = method == VETERAN
    return AdaptationRun(
        method,
        trial.seed,
        trial.settings,
        first={} if is_veteran else {name: client.adapted_first for name, client in newcomers.items()},
        last={
            name: (_known(client.after),) if is_veteran else client.adapted_last for name, client in newcomers.items()
        },
        trained={name: client.after for name, client in result.clients.items() if name not in newcomers},
        update_steps=scenario.rollout.num_envs * scenario.rollout.horizon,
        steps=scenario.rounds * scenario.steps,
        seconds=round(time.perf_counter() - start, 2),
    )


def _known(score: float | None) -> float:
    assert score is not None, "the run has finished"
    return score


def read_runs(path: Path = FILE) -> list[AdaptationRun]:
    """Read all runs of a results file."""
    if not path.exists():
        return []
    return [AdaptationRun(**json.loads(line)) for line in path.read_text().splitlines()]


def select_runs(runs: Sequence[AdaptationRun], seeds: Iterable[int] = SEEDS) -> list[AdaptationRun]:
    """Select the runs with the present settings."""
    wanted = {trial.settings for _, trial in plan_trials(seeds)}
    return [run for run in runs if run.settings in wanted]


# The table -----------------------------------------------------------------------------------------------------------


def curves_by_method(runs: Sequence[AdaptationRun]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Collect the seeds that are complete: each method's curves [S, H, U + 1], and the veterans' returns [S, H]."""
    of: dict[tuple[str, int], Any] = {(run.method, run.seed): run for run in runs}
    names = (*METHODS, VETERAN)
    seeds = [seed for seed in sorted({run.seed for run in runs}) if all((name, seed) in of for name in names)]
    curves = {method: np.array([list(of[method, seed].last.values()) for seed in seeds]) for method in METHODS}
    curves[RANDOM] = np.array([list(of["fedavg", seed].first.values()) for seed in seeds])
    return curves, np.array([[score for (score,) in of[VETERAN, seed].last.values()] for seed in seeds])


def updates_to_catch_up(curves: np.ndarray, veterans: np.ndarray) -> np.ndarray:
    """Count the updates until a newcomer first has 90 % of its veteran's return, [S, H]; infinite if it never has."""
    reached = curves >= SHARE * veterans[:, :, None]
    return np.where(reached.any(axis=2), reached.argmax(axis=2).astype(float), np.inf)


def format_table(runs: Sequence[AdaptationRun]) -> Iterator[str]:
    """Write a row for each start, and one of the veterans."""
    curves, veterans = curves_by_method(runs)
    if not veterans.size:
        return
    size = runs[0].update_steps
    shown = [number for number in SHOWN if number < curves[RANDOM].shape[2]]
    heads = [f"after {number * size:,} steps" if number else "before" for number in shown]
    yield f"| start | {' | '.join(heads)} | caught up | of these before any step | at the end | median steps |"
    yield f"| --- |{' ---: |' * (len(heads) + 4)}"
    for name, returns in curves.items():
        updates, count = updates_to_catch_up(returns, veterans), veterans.size
        stays = int((returns[:, :, -1] >= SHARE * veterans).sum())
        median = float(np.median(updates))
        cells = [format_iqm(returns[:, :, number]) for number in shown]
        cells += [
            f"{int(np.isfinite(updates).sum())} of {count}",
            f"{int((updates == 0).sum())}",
            f"{stays} of {count}",
        ]
        yield f"| {name} | {' | '.join(cells)} | {f'{median * size:,.0f}' if np.isfinite(median) else 'never'} |"
    steps = next(run.steps for run in runs if run.method == VETERAN)
    yield f"| {VETERAN}, {steps:,} steps | {' | '.join([format_iqm(veterans), *[''] * (len(heads) + 3)])} |"


def format_iqm(scores: np.ndarray) -> str:
    """Write the interquartile mean of [S, H] with an interval from resampling whole seeds."""
    result: Estimate = estimate(interquartile_mean, scores, generator=np.random.default_rng(0), whole_seeds=True)
    return f"{result.value:.0f} [{result.low:.0f}, {result.high:.0f}]"


if __name__ == "__main__":
    main()
