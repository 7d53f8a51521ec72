"""Measure rounds that do not wait for all clients against rounds that do, in virtual time on the local engine.

`poles` is the shipped scenario `paces`: eight poles, the slowest of which takes ten times as long as the fastest.
`two tasks` are four carts with half-poles of 0.1 m, and four with 1.5 m whose machines are ten times as slow, merged by
`fedavg`. `slow backwards` is the scenario `contrary`, with the two backwards carts five times as slow. Each runs for
the same 300 virtual seconds with rounds that wait, and with a buffer; for `two tasks` also with FedBuff's weights
(`round.rate_fair = false`).

The settings were chosen on the seeds 0 to 2. The seeds here, 500 to 509, were fixed before the first run.

The seeds 1500 to 1502, fixed beforehand too, ask what `poles` owes to its learning rate, at half and at twice of it.

    python -m benchmarks.buffered --seeds 10 --more-seeds 3 --jobs 2

Every finished run appends a JSON line to benchmarks/results/buffered.jsonl and is not repeated.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import grpo_fed
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import Estimate, estimate, interquartile_mean
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

FIRST_SEED, FIRST_MORE = 500, 1500
"""The first seeds of `CASES` and of `RATES`."""
TARGET = 450.0
"""The mean return over clients until which `poles` is timed."""
WINDOW = 10.0
"""Virtual seconds whose evaluations are averaged: those of a round that waits. A run that evaluates more often has no
more chances to reach the target by luck."""
END = 50.0
"""Virtual seconds at the end whose evaluations are the final return."""
WAIT, BUFFERED, FEDBUFF = "waits", "buffered", "buffered, FedBuff's weights"
WAITING = ('round.mode="sync"', "rounds=30", "evaluate.every=1")
IN_BUFFERS = ('round.mode="buffered"', "round.buffer=0.5")
FILE = RESULTS / "buffered.jsonl"
TASKS = Path(__file__).parent / "paces" / "two-tasks.toml"


@dataclass(frozen=True)
class Case:
    """A scenario, and its rounds that wait and that do not, as keys changed."""

    name: str
    path: Path
    variants: Mapping[str, Sequence[str]]


SLOW = ("clients.0.pace=1", "clients.1.pace=5")
CASES = (
    Case("poles", find_scenario("paces"), {WAIT: WAITING, BUFFERED: ()}),
    Case(
        "two tasks",
        TASKS,
        {
            WAIT: WAITING,
            BUFFERED: IN_BUFFERS,
            FEDBUFF: (*IN_BUFFERS, "round.rate_fair=false"),
        },
    ),
    Case(
        "slow backwards",
        find_scenario("contrary"),
        {WAIT: SLOW, BUFFERED: (*SLOW, *IN_BUFFERS, "rounds=180", "evaluate.every=10")},
    ),
)

RATES = tuple(
    Case(
        name,
        find_scenario("paces"),
        {WAIT: (*WAITING, f"objective.learning_rate={rate}"), BUFFERED: (f"objective.learning_rate={rate}",)},
    )
    for name, rate in (("half the learning rate", 1.25e-3), ("twice the learning rate", 5e-3))
)
"""`poles` around its learning rate of 2.5e-3."""


@dataclass(frozen=True)
class Run:
    """A finished run: a line of results."""

    case: str
    variant: str
    seed: int
    times: Sequence[float]
    """Virtual seconds of each evaluation after the first merge."""
    scores: Mapping[str, Sequence[float]]
    """For each client, its mean return in each of them."""
    departed: Mapping[str, Sequence[str]]
    """What clients had left when the run ended."""
    ever_left: Mapping[str, Sequence[str]]
    """What clients ever left."""
    seconds: float

    @property
    def means(self) -> np.ndarray:
        """The mean over clients of each evaluation."""
        return np.mean(list(self.scores.values()), axis=0)

    def time_to(self, target: float) -> float:
        """Find the virtual seconds after which the mean of the last `WINDOW` reaches a target; infinite if never."""
        times = np.array(self.times)
        for time in times:
            if self.means[(times > time - WINDOW) & (times <= time)].mean() >= target:
                return float(time)
        return float("inf")

    def final(self, entry: str = "") -> float:
        """Compute the mean return of an entry's clients in the last `END` seconds; of all clients without an entry."""
        chosen = np.array(self.times) > self.times[-1] - END
        return float(np.mean([np.array(each)[chosen] for name, each in self.scores.items() if name.startswith(entry)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help=f"number of seeds, from {FIRST_SEED} on; default: 10")
    parser.add_argument("--more-seeds", type=int, default=3, help=f"those from {FIRST_MORE} on; default: 3")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process with one thread")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    done = {(run.case, run.variant, run.seed) for run in read_runs(arguments.results)}
    planned = [
        (case.name, variant, seed)
        for cases, first, count in ((CASES, FIRST_SEED, arguments.seeds), (RATES, FIRST_MORE, arguments.more_seeds))
        for seed in range(first, first + count)
        for case in cases
        for variant in case.variants
        if (case.name, variant, seed) not in done
    ]
    for name, variant, seed in planned:
        load_scenario(name, variant, seed)  # a mistake is told before the first run
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        for future in as_completed([workers.submit(make_run, *each) for each in planned]):
            run = future.result()
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(f"{run.case}, {run.variant}, seed {run.seed}: {run.final():.1f}, {run.departed}", flush=True)
    print("\n".join(format_tables(read_runs(arguments.results))))


def load_scenario(name: str, variant: str, seed: int) -> Scenario:
    """Load a case's scenario with the keys of a variant."""
    case = next(case for case in (*CASES, *RATES) if case.name == name)
    return Scenario.load(case.path, (*case.variants[variant], f"seed={seed}", 'device="cpu"'))


def make_run(name: str, variant: str, seed: int) -> Run:
    """Make a run, with all clients in this process."""
    scenario = load_scenario(name, variant, seed)
    records: list[RoundRecord] = []
    result = grpo_fed.run(scenario, watch=records.append, workers=0)
    rest = [record for record in records[1:] if record.scores]
    left: dict[str, dict[str, None]] = {}
    for record in records[1:]:
        for client in record.clients:
            left.setdefault(client.client, {}).update(dict.fromkeys(client.departed))
    return Run(
        name,
        variant,
        seed,
        times=[round(record.server.virtual_seconds or 0.0, 3) for record in rest],
        scores={client: [round(record.scores[client], 2) for record in rest] for client in rest[0].scores},
        departed={client.client: client.departed for client in records[-1].clients if client.departed},
        ever_left={client: list(blocks) for client, blocks in left.items() if blocks},
        seconds=round(result.seconds, 1),
    )


def read_runs(results: Path) -> list[Run]:
    """Read all runs of a results file."""
    return [Run(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []


def format_tables(runs: Sequence[Run]) -> Iterator[str]:
    """Write a table for each case."""
    select = {case.name: {v: _select(runs, case.name, v) for v in case.variants} for case in (*CASES, *RATES)}
    if not all(chosen for case in CASES for chosen in select[case.name].values()):
        return
    yield f"**Poles**: virtual seconds until the mean return is {TARGET:g}, and the mean return at the end."
    yield ""
    yield from _format_times_and_returns({"": select["poles"]})
    yield ""
    yield from _compare_times(select["poles"])
    yield ""
    yield "**Two tasks**: returns at the end."
    yield ""
    yield "| rounds | the fast task | the slow task | seeds |"
    yield "| --- | --- | --- | --- |"
    for variant, chosen in select["two tasks"].items():
        finals = (_format(_finals(chosen, entry)) for entry in ("fast", "slow"))
        yield f"| {variant} | {' | '.join(finals)} | {len(chosen)} |"
    yield ""
    yield "**Slow backwards**: who has left what at the end."
    yield ""
    yield "| rounds | backwards carts out of something | straight carts that ever left | straight | backwards | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for variant, chosen in select["slow backwards"].items():
        found = sum(name.startswith("backwards") for run in chosen for name in run.departed)
        actors = sum("actor" in run.departed.get(f"backwards-{number}", ()) for run in chosen for number in range(2))
        wrong = sum(name.startswith("cart") for run in chosen for name in run.ever_left)
        cells = (
            variant,
            f"{found} of {2 * len(chosen)} (the actor: {actors})",
            f"{wrong} of {4 * len(chosen)}",
            _format(_finals(chosen, "cart")),
            _format(_finals(chosen, "backwards")),
            str(len(chosen)),
        )
        yield f"| {' | '.join(cells)} |"
    if not all(chosen for case in RATES for chosen in select[case.name].values()):
        return
    yield ""
    yield f"**Poles at half and at twice the learning rate**, on seeds of their own from {FIRST_MORE} on."
    yield ""
    yield from _format_times_and_returns({f"{case.name}, ": select[case.name] for case in RATES})
    yield ""
    for case in RATES:
        reached = {
            variant: sum(run.time_to(TARGET) < float("inf") for run in chosen)
            for variant, chosen in select[case.name].items()
        }
        waits, buffered = (f"{reached[variant]} of {len(select[case.name][variant])}" for variant in (WAIT, BUFFERED))
        yield f"- At {case.name} {waits} runs that wait reach {TARGET:g}, and {buffered} with a buffer."


def _format_times_and_returns(cases: Mapping[str, Mapping[str, Sequence[Run]]]) -> Iterator[str]:
    """Write a table with a row for each variant of each case; by what a row's name begins with."""
    yield f"| rounds | seconds to {TARGET:g}, median (range) | return at the end | lowest client | seeds |"
    yield "| --- | --- | --- | --- | --- |"
    for begin, variants in cases.items():
        for variant, chosen in variants.items():
            times = [run.time_to(TARGET) for run in chosen]
            lowest = np.mean([min(run.final(client) for client in run.scores) for run in chosen])
            cells = f"{begin}{variant}", _format_times(times), _format(_finals(chosen)), f"{lowest:.0f}"
            yield f"| {' | '.join((*cells, str(len(chosen))))} |"


def _select(runs: Sequence[Run], case: str, variant: str) -> list[Run]:
    chosen = [run for run in runs if run.case == case and run.variant == variant]
    return sorted(chosen, key=lambda run: run.seed)


def _compare_times(variants: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """Write how many times as long the run that waits takes, seed by seed."""
    times = {(variant, run.seed): run.time_to(TARGET) for variant, runs in variants.items() for run in runs}
    seeds = [seed for variant, seed in times if variant == WAIT and (BUFFERED, seed) in times]
    ratios = [times[WAIT, seed] / times[BUFFERED, seed] for seed in seeds]
    medians = np.median([times[WAIT, seed] for seed in seeds]) / np.median([times[BUFFERED, seed] for seed in seeds])
    yield (
        f"Waiting takes {medians:.2f} times as long by the medians; seed by seed {min(ratios):.2f} to "
        f"{max(ratios):.2f}, median {np.median(ratios):.2f}."
    )


def _finals(runs: Sequence[Run], entry: str = "") -> np.ndarray:
    return np.array([[run.final(entry)] for run in runs])


def _format(values: np.ndarray) -> str:
    result: Estimate = estimate(interquartile_mean, values, generator=np.random.default_rng(0))
    return f"{result.value:.0f} [{result.low:.0f}, {result.high:.0f}]"


def _format_times(times: Sequence[float]) -> str:
    return f"{np.median(times):.0f} ({min(times):.0f} to {max(times):.0f})"


if __name__ == "__main__":
    main()
