"""Measure whether anybody stays out where sharing pays: random Markov decision processes with tables in common.

Six clients learn by natural policy gradient, 30 rounds of 64 steps; kappa is the part of a client's tables that is its
own (benchmarks/structures/tabular.toml). A run is measured by the mean return of 15 evaluations in between.

    python -m benchmarks.tabular

writes benchmarks/results/tabular.json. The seeds, 200 to 204, were fixed before the first run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grpo_fed
from benchmarks.structure_runs import FOLDER
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import estimate
from grpo_fed.scenario.scenario import Scenario

FILE = Path(__file__).parent / "results" / "tabular.json"
KAPPAS = (0.1, 0.3, 0.6, 1.0)
METHODS = ("local", "fedavg", "grpo")
SEEDS = range(200, 205)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {"kappa": kappa, "method": method, "seed": seed, **measure_run(kappa, method, seed)}
        for kappa in KAPPAS
        for method in METHODS
        for seed in SEEDS
    ]
    arguments.results.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(format_table(rows)))


def measure_run(kappa: float, method: str, seed: int) -> dict[str, float]:
    """Make a run: its mean return, and the share of (client, round) in which a client did not share the table."""
    changes = [f"seed={seed}", 'device="cpu"', f"method={method}", f"clients.0.kwargs.kappa={kappa}"]
    changes += ["steps=64", "rollout.num_envs=4", "rollout.horizon=16", "evaluate.every=2"]
    records: list[RoundRecord] = []
    scenario = Scenario.load(FOLDER / "tabular.toml", changes)
    grpo_fed.run(scenario, watch=records.append, workers=0)
    scores = [np.mean(list(record.scores.values())) for record in records[1:] if record.scores]
    out = [bool(client.departed) for record in records[1:] for client in record.clients]
    return {"return": round(float(np.mean(scores)), 3), "out": float(np.mean(out))}


def format_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write the returns of each kappa and method, and what each gains over `local`, with bootstrap intervals."""
    yield "| kappa | local | fedavg above local | grpo above local | clients out with grpo |"
    yield "| --- | --- | --- | --- | --- |"
    for kappa in KAPPAS:
        of = {
            method: np.array([row["return"] for row in rows if (row["kappa"], row["method"]) == (kappa, method)])
            for method in METHODS
        }
        out = np.mean([row["out"] for row in rows if (row["kappa"], row["method"]) == (kappa, "grpo")])
        gains = [format_interval(of[method] - of["local"], "+") for method in METHODS[1:]]
        yield f"| {kappa:g} | {format_interval(of['local'])} | {' | '.join(gains)} | {out:.0%} of rounds |"


def format_interval(values: np.ndarray, sign: str = "") -> str:
    """Write a mean with its interval."""
    result = estimate(lambda scores: scores.mean(axis=(-2, -1)), values[:, None], generator=np.random.default_rng(0))
    return f"{result.value:{sign}.1f} [{result.low:{sign}.1f}, {result.high:{sign}.1f}]"


if __name__ == "__main__":
    main()
