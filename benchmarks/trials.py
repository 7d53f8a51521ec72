"""Runs of a federation for the benchmarks that compare methods: a scenario that ships, a method, a seed.

A finished run appends a JSON line. A run that has its line is skipped, so a command may be interrupted and repeated. A
line holds for the scenario as its file is now: when values there change, comments aside, it is as if it were not there.
"""

import os

# Before torch and numpy load: one thread a process, since the matrices are small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import hashlib
import json
import multiprocessing
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grpo_fed
from benchmarks.learning import installed_versions, machine_kind
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import ClientRecord, RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Trial:
    """What is run."""

    scenario: str
    """Of the gallery."""
    method: str
    seed: int
    overrides: tuple[str, ...] = ()
    """As after `--set`."""
    variant: str = ""
    """A name for them."""

    @property
    def settings(self) -> str:
        """A digest of all that decides the outcome, but for the code."""
        text = json.dumps([_given(self.scenario), self.method, self.seed, self.overrides], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self) -> Scenario:
        """The whole scenario."""
        given = (f"method={self.method}", f"seed={self.seed}", 'device="cpu"', *self.overrides)
        return Scenario.load(find_scenario(self.scenario), given)


@cache
def _given(scenario: str) -> Mapping[str, Any]:
    """What its file says, but for what it says to readers."""
    given = tomllib.loads(find_scenario(scenario).read_text())
    return {key: value for key, value in given.items() if key != "description"}


@dataclass(frozen=True)
class Run:
    """One finished run: one line of a results file. Lists by round begin with round 1."""

    scenario: str
    variant: str
    method: str
    seed: int
    settings: str
    """Of its trial."""
    returns: Mapping[str, Sequence[float | None]]
    """By client, the mean return of each round's training episodes."""
    scores: Mapping[str, Sequence[float | None]]
    """By client, the mean return of the episodes played after each round, where there were any."""
    before: Mapping[str, float | None]
    """By client, that of the first policy."""
    personal: Mapping[str, Sequence[Sequence[str]]]
    """By client, the groups that it had left after each round."""
    groups: Mapping[str, str]
    """Every group of the shared blocks, and its block."""
    clusters: Sequence[Mapping[str, Sequence[Sequence[str]]]]
    """With the rule `clusters`, of each round: by block, the clients that share it with each other."""
    steps: int
    """Environment steps of all clients."""
    seconds: float
    cpu_seconds: float
    """Processor time, which other work on the machine disturbs less."""
    machine: str
    versions: Mapping[str, str]
    """Of the packages that a result depends on."""


def add_arguments(
    parser: argparse.ArgumentParser, results: Path, seeds: int, methods: Sequence[str], first: int = 0
) -> None:
    """What every such command takes."""
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many, counted from {first}")
    parser.add_argument("--methods", default=",".join(methods), help=f"comma-separated; default: {','.join(methods)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process of one thread each")
    parser.add_argument("--results", type=Path, default=results)


def run_all(trials: Sequence[Trial], results: Path, jobs: int) -> list[Run]:
    """Those that have no line yet, then all of them, in the order of the trials."""
    done = {run.settings for run in read_runs(results)}
    pending = [trial for trial in trials if trial.settings not in done]
    results.parent.mkdir(parents=True, exist_ok=True)
    # Spawned, so that a worker sets its threads before any have started.
    workers = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with workers:
        for future in as_completed([workers.submit(run_and_record, trial, results) for trial in pending]):
            run = future.result()
            last = [scores[-1] for scores in run.scores.values() if scores[-1] is not None]
            what = " ".join(filter(None, (run.scenario, run.variant, run.method)))
            print(f"{what} seed {run.seed}: {run.seconds} s, returns {np.mean(last):.1f}", flush=True)
    return of(trials, read_runs(results))


def of(trials: Sequence[Trial], runs: Sequence[Run]) -> list[Run]:
    """The runs of these trials that there are, in their order."""
    found = {run.settings: run for run in runs}
    return [found[trial.settings] for trial in trials if trial.settings in found]


def read_runs(results: Path) -> list[Run]:
    """Every run that has its line."""
    if not results.exists():
        return []
    return [Run(**json.loads(line)) for line in results.read_text().splitlines()]


def run_and_record(trial: Trial, results: Path) -> Run:
    """The worker writes the line itself, so that a run that fails takes no other run's line with it."""
    made = run(trial)
    with results.open("a") as file:
        file.write(json.dumps(asdict(made)) + "\n")
    return made


def run(trial: Trial) -> Run:
    """One run on the local engine, all clients in this process."""
    scenario = trial.load()
    commons = resolve_shared_blocks(scenario)
    notes: list[RoundRecord] = []
    start, cpu_start = time.perf_counter(), time.process_time()
    grpo_fed.run(scenario, watch=notes.append, workers=0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    first, *rest = notes
    clients = [{one.client: one for one in note.clients} for note in rest]
    return Run(
        scenario=trial.scenario,
        variant=trial.variant,
        method=trial.method,
        seed=trial.seed,
        settings=trial.settings,
        returns={name: [each[name].mean for each in clients] for name in commons.clients},
        scores={name: [each[name].score for each in clients] for name in commons.clients},
        before={name: first.scores.get(name) for name in commons.clients},
        personal={name: [list(each[name].departed) for each in clients] for name in commons.clients},
        groups=dict(zip(commons.groups.names, commons.groups.blocks, strict=True)),
        clusters=[parts(each) for each in clients] if scenario.merge.rule == "clusters" else [],
        steps=rest[-1].env_steps,
        seconds=round(seconds, 2),
        cpu_seconds=round(cpu_seconds, 2),
        machine=machine_kind(),
        versions=installed_versions(),
    )


def parts(clients: Mapping[str, ClientRecord]) -> dict[str, list[list[str]]]:
    """By block, the clients of each cluster."""
    found: dict[str, dict[int, list[str]]] = {}
    for name, one in clients.items():
        for block, number in one.clusters.items():
            found.setdefault(block, {}).setdefault(number, []).append(name)
    return {block: [own[number] for number in sorted(own)] for block, own in found.items()}
