"""Measure stable-baselines3's PPO, unchanged, in a federation by our merge over Flower's simulation.

Six carts, two of them wired backwards, as in the scenario `contrary`: 30 rounds of 2,048 steps. A client is
stable-baselines3's PPO with that scenario's learning rate, epochs and minibatches, in four environments of 256 steps
where ours has eight of 128, since a client's episodes begin anew with each round; the server is Flower's, with the
strategy `grpo_fed.flower.Grouped` and the scenario's budgets, or Flower's own FedAvg. Beside them is our own run of the
scenario. Seeds are 800 to 802, fixed before the first run; no setting was tuned here.

    python -m benchmarks.sb3_federated

Every finished run appends a JSON line to benchmarks/results/sb3_federated.jsonl and is not repeated. *Found* are the
backward clients that are out of the actor at the end, and of nothing else; *out* are straight clients that are out of
something. Returns are the means of 20 episodes with deterministic actions after the last round.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import grpo_fed
from grpo_fed.adapters import ClientInfo, TorchLearner, client_app, initial_arrays, sb3_learner
from grpo_fed.adapters.learner import load_module
from grpo_fed.flower import Grouped
from grpo_fed.flower.measurement import to_arrays
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import estimate, interquartile_mean
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

SEEDS = range(800, 803)
FILE = RESULTS / "sb3_federated.jsonl"
CLIENTS, STRAIGHT, ROUNDS, STEPS, EPISODES, RATE = 6, 4, 30, 2048, 20, 2.5e-3
BACKWARD = range(STRAIGHT, CLIENTS)
BLOCKS = {
    "torso.0": ["mlp_extractor.policy_net.0.*"],
    "torso.1": ["mlp_extractor.policy_net.2.*"],
    "actor": ["action_net.*"],
}
"""The same blocks as in the scenario; the critics stay with the clients."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run. Clients 0 to 3 are straight, 4 and 5 backward; tables have their numbers as texts."""

    scores: Sequence[float]
    """The final return of every client."""
    left: Mapping[str, Sequence[tuple[int, str]]]
    """The round and the block of everything that a client left; only clients that left something."""
    departed: Mapping[str, Sequence[str]]
    """What each client is out of at the end; only clients that are out of something."""
    kl: float | None
    """The largest KL of a round's step, as the clients measured it; None without budgets."""


@dataclass(frozen=True)
class Sb3Run:
    """One finished run: a line of the results file."""

    method: str
    seed: int
    outcome: Outcome
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help="comma-separated; default: all")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = {(run.method, run.seed) for run in read_runs(arguments.results)}
    for method in arguments.methods.split(",") if arguments.methods else METHODS:
        for seed in SEEDS:
            if (method, seed) not in done:
                start = time.perf_counter()
                outcome = METHODS[method](seed)
                run = Sb3Run(method, seed, outcome, round(time.perf_counter() - start, 1))
                with arguments.results.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
                print(f"{method} seed {seed}: {outcome.scores} {outcome.left} {run.seconds} s", flush=True)
    print("\n".join(format_table(read_runs(arguments.results))))


# The methods ---------------------------------------------------------------------------------------------------------


def run_grouped(seed: int) -> Outcome:
    """Federate with departures and with the scenario's budgets."""
    sampling = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    grouped = Grouped(sampling, blocks=BLOCKS, chains=[list(BLOCKS)], budget=0.02, joint_budget=0.05)
    simulate(grouped, seed)
    names = [f"client-{number}" for number in range(CLIENTS)]
    left = {
        str(number): [(record.round, block) for record in grouped.history for block in record.left.get(name, ())]
        for number, name in enumerate(names)
    }
    return Outcome(
        scores=[score(number, seed, grouped.arrays_of(name)) for number, name in enumerate(names)],
        left={number: rows for number, rows in left.items() if rows},
        departed={str(names.index(name)): list(blocks) for name, blocks in grouped.departed.items()},
        kl=max(record.step.joint or 0.0 for record in grouped.history if record.step is not None),
    )


def run_fedavg(seed: int) -> Outcome:
    """Federate with Flower's FedAvg."""
    arrays = simulate(FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS), seed)
    return Outcome([score(number, seed, arrays) for number in range(CLIENTS)], {}, {}, None)


def run_ours(seed: int) -> Outcome:
    """Run our own scenario."""
    records: list[RoundRecord] = []
    scenario = Scenario.load(find_scenario("contrary"), (f"seed={seed}", 'device="cpu"'))
    result = grpo_fed.run(scenario, watch=records.append, workers=0)
    numbers = {name: str(number) for number, name in enumerate(result.clients)}
    left: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        for client in record.clients:
            for group in client.left:
                left.setdefault(numbers[client.client], []).append((record.round, group))
    steps = [record.server.step for record in records if record.server is not None]
    return Outcome(
        scores=[float(client.after) for client in result.clients.values() if client.after is not None],
        left=left,
        departed={numbers[name]: list(each.personal_groups) for name, each in result.clients.items()},
        kl=max(step.joint or 0.0 for step in steps if step is not None),
    )


METHODS = {"sb3 grouped": run_grouped, "grpo_fed": run_ours, "sb3 fedavg": run_fedavg}
"""By name, what makes a run of a seed."""


def simulate(strategy: Strategy, seed: int) -> ArrayRecord:
    """Run a strategy and six clients in Flower's simulation; return the shared model."""
    from flwr.simulation import run_simulation  # with Ray, which only these runs need

    make, server, arrays = partial(make_learner, seed), ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        result = strategy.start(grid=grid, initial_arrays=initial_arrays(make), num_rounds=ROUNDS)
        arrays.append(result.arrays)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(server_app=server, client_app=client_app(make), num_supernodes=CLIENTS, backend_config=resources)
    return arrays[0]


def score(number: int, seed: int, arrays: ArrayRecord) -> float:
    """Play with a client's model in its environment."""
    learner = make_learner(seed, ClientInfo(f"client-{number}", number, ROUNDS, seed=number))
    load_module(learner.module, to_arrays(arrays))
    assert learner.evaluate is not None
    return learner.evaluate()["return"]


def make_learner(seed: int, client: ClientInfo) -> TorchLearner:
    """Make a client. seed: of the run, which Flower's simulation in a script does not hand to its clients."""
    import grpo_fed.tasks.families  # noqa: F401, registers the cart in the processes of the simulation

    torch.set_num_threads(1)
    return sb3_learner(make_model(replace(client, seed=(client.seed + 7919 * seed) % 2**31)), STEPS, EPISODES)


def make_model(client: ClientInfo) -> PPO:
    """Make stable-baselines3's PPO on a cart, at the learning rate of the client's round."""

    def make_env() -> gymnasium.Env:
        return Monitor(gymnasium.make("grpo_fed/CartPole-v1", swap_actions=client.number >= STRAIGHT))

    return PPO(
        "MlpPolicy",
        DummyVecEnv([make_env] * 4),
        n_steps=256,
        batch_size=256,
        n_epochs=4,
        learning_rate=RATE * (1 - max(0, client.round - 1) / ROUNDS),
        seed=client.seed,
        device="cpu",
    )


# The table -----------------------------------------------------------------------------------------------------------


def read_runs(results: Path) -> list[Sb3Run]:
    """Read the finished runs."""
    if not results.exists():
        return []
    return [read_run(json.loads(line)) for line in results.read_text().splitlines()]


def read_run(line: dict[str, Any]) -> Sb3Run:
    """Read a line of the results file."""
    return Sb3Run(**{**line, "outcome": Outcome(**line["outcome"])})


def format_table(runs: Sequence[Sb3Run]) -> Iterator[str]:
    """Write a line for each method."""
    if not runs:
        return
    yield "| method | straight carts | backward carts | found | in rounds | out | largest KL | seconds | seeds |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for method in METHODS:
        of_method = [run for run in runs if run.method == method]
        if of_method:
            yield format_row(method, of_method)


def format_row(method: str, runs: Sequence[Sb3Run]) -> str:
    """Write the line of a method."""
    outcomes = [run.outcome for run in runs]
    scores = np.array([outcome.scores for outcome in outcomes])
    cells = [method, describe(scores[:, :STRAIGHT]), describe(scores[:, STRAIGHT:]), "", "", "", ""]
    if all(outcome.kl is not None for outcome in outcomes):
        found = [list(outcome.departed.get(str(k), ())) == ["actor"] for outcome in outcomes for k in BACKWARD]
        rounds = [round for outcome in outcomes for k in BACKWARD for round, _ in outcome.left.get(str(k), ())]
        out = sum(bool(outcome.departed.get(str(k))) for outcome in outcomes for k in range(STRAIGHT))
        cells[3:] = [
            f"{sum(found)} of {len(found)}",
            f"{min(rounds)} to {max(rounds)}" if rounds else "",
            f"{out} of {STRAIGHT * len(outcomes)}",
            f"{max(outcome.kl or 0.0 for outcome in outcomes):.3f}",
        ]
    return f"| {' | '.join([*cells, f'{np.median([run.seconds for run in runs]):.0f}', str(len(runs))])} |"


def describe(scores: np.ndarray) -> str:
    """Write the interquartile mean over seeds and clients with its interval, and the range."""
    result = estimate(interquartile_mean, scores, generator=np.random.default_rng(0))
    return f"{result.value:.4g} [{result.low:.4g}, {result.high:.4g}], {scores.min():.4g} to {scores.max():.4g}"


if __name__ == "__main__":
    main()
