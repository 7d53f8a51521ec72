"""Measure what differential privacy costs a thousand carts: their returns, epsilon, and the noise beside its price.

    python -m benchmarks.privacy

`scenarios/private.toml` with the seeds 1200 to 1202, which were fixed beforehand; the scenario was chosen on seed 0. In
each merge the mean of the differences, cut to the bounds, is computed once more from the clients' answers by other
code, and what the server released beyond it is the measured noise. Epsilon is computed by opacus too, which has to be
installed. Every finished run appends a JSON line to benchmarks/results/privacy.jsonl and is not repeated.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

import grpo_fed
from grpo_fed.aggregation.privacy.mechanism import Mechanism
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.private_merge import PrivateMerge
from grpo_fed.federation.round_merge import MergeTarget
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

FILE = RESULTS / "privacy.jsonl"
SEEDS = range(1200, 1203)
WORKERS = 2


@dataclass(frozen=True)
class PrivacyRun:
    """One finished run: a line of the results file."""

    seed: int
    settings: str
    """The scenario, without its name and description."""
    clients: int
    before: float
    """The mean return of the first policies."""
    after: float
    """The mean return of the last policies."""
    median: float
    """The median of these returns."""
    epsilon: float
    opacus: float
    """Epsilon of the same merges by opacus."""
    delta: float
    merges: int
    predicted: float
    """The length of the noise in the mean, by that of a difference at its bounds, as `explain` has it."""
    measured: tuple[float, ...]
    """The same in each merge, from the clients' answers."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    done = {(run.seed, run.settings) for run in read_runs(arguments.results)}
    for seed in arguments.seeds:
        if (seed, settings_of(load(seed))) not in done:
            run = make_run(seed)
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
    print("\n".join(format_table(select_runs(read_runs(arguments.results)))))


def load(seed: int) -> Scenario:
    """Read the scenario with a seed."""
    return Scenario.load(find_scenario("private"), (f"seed={seed}", 'device="cpu"'))


def settings_of(scenario: Scenario) -> str:
    """Write what determines a run, but for its seed and its words."""
    return scenario.model_copy(update={"name": "", "description": "", "seed": 0}).model_dump_json(exclude_defaults=True)


def make_run(seed: int) -> PrivacyRun:
    """Make a run and measure the noise of its merges."""
    scenario = load(seed)
    shared_blocks = resolve_shared_blocks(scenario)
    mechanism = Mechanism.of(scenario, shared_blocks)
    differences: list[np.ndarray] = []
    measured: list[float] = []
    add, target = PrivateMerge.add, PrivateMerge.target

    def watching_add(merge: PrivateMerge, client: str, trained: Trained, times: float = 1.0) -> None:
        differences.append(trained.point.astype(np.float64) - merge._shared)
        add(merge, client, trained, times)

    def watching_target(merge: PrivateMerge, shared: Tensor) -> MergeTarget:
        bounds = np.array(merge._state.bounds)
        found = target(merge, shared)
        released = found.point.numpy().astype(np.float64) - shared.numpy()
        noise = released - cut_mean(differences, mechanism.groups, bounds, mechanism.divisor)
        measured.append(float(np.linalg.norm(noise) / np.linalg.norm(bounds)))
        differences.clear()
        return found

    began = time.perf_counter()
    with patch.object(PrivateMerge, "add", watching_add), patch.object(PrivateMerge, "target", watching_target):
        result = grpo_fed.run(scenario, workers=WORKERS)
    assert result.privacy is not None
    before = [client.before for client in result.clients.values() if client.before is not None]
    merges = result.privacy.merges
    return PrivacyRun(
        seed=seed,
        settings=settings_of(scenario),
        clients=len(result.clients),
        before=float(np.mean(before)),
        after=float(result.returns.mean()),
        median=float(np.median(result.returns)),
        epsilon=result.privacy.epsilon,
        opacus=epsilon_of_opacus(mechanism.multiplier, mechanism.rate, merges, mechanism.delta),
        delta=mechanism.delta,
        merges=merges,
        predicted=mechanism.price_of(mechanism.bounds.tolist()),
        measured=tuple(measured),
        seconds=round(time.perf_counter() - began, 1),
    )


def cut_mean(differences: Sequence[np.ndarray], groups: np.ndarray, bounds: np.ndarray, divisor: float) -> np.ndarray:
    """Average differences [S] after each of their groups was cut to its bound, one client and group after another."""
    total = np.zeros(len(groups))
    for difference in differences:
        for group, bound in enumerate(bounds):
            part = difference[groups == group]
            length = float(np.linalg.norm(part))
            total[groups == group] += part * min(1.0, bound / length) if length else 0.0
    return total / divisor


def epsilon_of_opacus(noise: float, rate: float, merges: int, delta: float) -> float:
    """Compute epsilon by opacus."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.rdp import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(noise, rate, merges)]
        return float(accountant.get_epsilon(delta))


def read_runs(path: Path = FILE) -> list[PrivacyRun]:
    """Read all runs of a results file."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [PrivacyRun(**{**line, "measured": tuple(line["measured"])}) for line in lines]


def select_runs(runs: Sequence[PrivacyRun]) -> list[PrivacyRun]:
    """Select the runs with the present settings and the seeds that were fixed, in their order."""
    present = settings_of(load(0))
    return sorted((run for run in runs if run.seed in SEEDS and run.settings == present), key=lambda run: run.seed)


def format_table(runs: Sequence[PrivacyRun]) -> Iterator[str]:
    """Write a row for each seed."""
    if not runs:
        return
    yield "| seed | before | mean return | median | epsilon | by opacus | price | measured | seconds |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for run in runs:
        cells = f"{run.before:.0f} | {run.after:.0f} | {run.median:.0f} | {run.epsilon:.3f} | {run.opacus:.3f}"
        yield f"| {run.seed} | {cells} | {run.predicted:.4f} | {np.mean(run.measured):.4f} | {run.seconds:.0f} |"


if __name__ == "__main__":
    main()
