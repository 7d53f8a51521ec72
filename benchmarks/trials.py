"""Runs of a federation for the benchmarks that compare methods: a shipped scenario, a method and a seed.

A finished run appends a JSON line. A run that has a line is skipped, so a command may be interrupted and repeated. A
line is valid as long as the values in the scenario's file are the same; when they change, the run is repeated.
"""

import os

# Set before torch and numpy are loaded: one thread in each process, since the matrices are small.
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
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grpo_fed
from benchmarks.learning import describe_machine, installed_versions
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Trial:
    """One run to make: a scenario with a method and a seed."""

    scenario: str
    """Name of a shipped scenario."""
    method: str
    seed: int
    overrides: tuple[str, ...] = ()
    """Changed keys, as after `--set`."""
    variant: str = ""
    """Name of this set of overrides."""

    @property
    def settings(self) -> str:
        """Digest of everything but the code that determines the result."""
        text = json.dumps([_given(self.scenario), self.method, self.seed, self.overrides], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self) -> Scenario:
        """Load the scenario with the method, the seed and the overrides."""
        given = (f"method={self.method}", f"seed={self.seed}", 'device="cpu"', *self.overrides)
        return Scenario.load(find_scenario(self.scenario), given)


@cache
def _given(scenario: str) -> Mapping[str, Any]:
    """Read the values of a shipped scenario's file, without its description."""
    given = tomllib.loads(find_scenario(scenario).read_text())
    return {key: value for key, value in given.items() if key != "description"}


@dataclass(frozen=True)
class Run:
    """One finished run: a line of a results file. Lists by round begin with round 1."""

    scenario: str
    variant: str
    method: str
    seed: int
    settings: str
    """`Trial.settings`."""
    returns: Mapping[str, Sequence[float | None]]
    """For each client, the mean return of the training episodes of each round."""
    scores: Mapping[str, Sequence[float | None]]
    """For each client, the mean return of the evaluation after each round; None without one."""
    before: Mapping[str, float | None]
    """For each client, the mean return of the first policy's evaluation."""
    personal: Mapping[str, Sequence[Sequence[str]]]
    """For each client, the departed groups after each round."""
    groups: Mapping[str, str]
    """The block of every group of the shared blocks."""
    steps: int
    """Environment steps of all clients."""
    seconds: float
    cpu_seconds: float
    """Processor time, which depends less on other work on the machine."""
    machine: str
    versions: Mapping[str, str]
    """Versions of the packages that a result depends on."""


def add_arguments(
    parser: argparse.ArgumentParser, results: Path, seeds: int, methods: Sequence[str], first: int = 0
) -> None:
    """Add the arguments that these commands have in common."""
    parser.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds, from {first} on; default: {seeds}")
    parser.add_argument("--methods", default=",".join(methods), help=f"comma-separated; default: {','.join(methods)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process with one thread")
    parser.add_argument("--results", type=Path, default=results)


def run_all(trials: Sequence[Trial], results: Path, jobs: int) -> list[Run]:
    """Make the runs that have no line yet; returns all of them in the order of the trials."""
    done = {run.settings for run in read_runs(results)}
    pending = [trial for trial in trials if trial.settings not in done]
    results.parent.mkdir(parents=True, exist_ok=True)
    # Spawned, so that a worker sets the number of its threads before any thread starts.
    workers = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with workers:
        for future in as_completed([workers.submit(run_and_record, trial, results) for trial in pending]):
            run = future.result()
            last = [scores[-1] for scores in run.scores.values() if scores[-1] is not None]
            what = " ".join(filter(None, (run.scenario, run.variant, run.method)))
            print(f"{what} seed {run.seed}: {run.seconds} s, returns {np.mean(last):.1f}", flush=True)
    return select_runs(trials, read_runs(results))


def select_runs(trials: Sequence[Trial], runs: Sequence[Run]) -> list[Run]:
    """Select the finished runs of these trials, in their order."""
    by_settings = {run.settings: run for run in runs}
    return [by_settings[trial.settings] for trial in trials if trial.settings in by_settings]


def read_runs(results: Path) -> list[Run]:
    """Read all runs of a results file."""
    if not results.exists():
        return []
    names = [field.name for field in fields(Run)]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return [Run(**{name: line[name] for name in names}) for line in lines]  # older lines have more


def run_and_record(trial: Trial, results: Path) -> Run:
    """Make a run and append its line. The worker writes it, so that a failing run loses no other run's line."""
    finished = run_trial(trial)
    with results.open("a") as file:
        file.write(json.dumps(asdict(finished)) + "\n")
    return finished


def run_trial(trial: Trial) -> Run:
    """Make one run on the local engine, with all clients in this process."""
    scenario = trial.load()
    shared_blocks = resolve_shared_blocks(scenario)
    records: list[RoundRecord] = []
    start, cpu_start = time.perf_counter(), time.process_time()
    grpo_fed.run(scenario, watch=records.append, workers=0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    first, *rest = records
    clients = [{one.client: one for one in record.clients} for record in rest]
    return Run(
        scenario=trial.scenario,
        variant=trial.variant,
        method=trial.method,
        seed=trial.seed,
        settings=trial.settings,
        returns={name: [each[name].mean for each in clients] for name in shared_blocks.clients},
        scores={name: [each[name].score for each in clients] for name in shared_blocks.clients},
        before={name: first.scores.get(name) for name in shared_blocks.clients},
        personal={name: [list(each[name].departed) for each in clients] for name in shared_blocks.clients},
        groups=dict(zip(shared_blocks.groups.names, shared_blocks.groups.blocks, strict=True)),
        steps=rest[-1].env_steps,
        seconds=round(seconds, 2),
        cpu_seconds=round(cpu_seconds, 2),
        machine=describe_machine(),
        versions=installed_versions(),
    )
