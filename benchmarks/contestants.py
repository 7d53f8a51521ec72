"""The contestants of benchmarks/federation.py, each of which runs in a process of its own.

    python -m benchmarks.contestants ours '{"task": "CartPole-v1", "clients": 64, "rounds": 8, "steps": 2048}'

prints the seconds of each round and the process's peak memory as JSON. The peer's counterpart is
benchmarks/ray_peer/sb3_peer.
"""

import os

# Set before torch and numpy are loaded: one thread a process, since the matrices are small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.memory import peak_mb
from grpo_fed.aggregation.merge import StreamingMean
from grpo_fed.engines.local.grid import LocalGrid
from grpo_fed.engines.local.schedule import ChunkSchedule, make_chunks
from grpo_fed.engines.start import run
from grpo_fed.engines.wire import Codec
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.engines.workers.pool import InProcessExecutor
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Train,
    Trained,
)
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

NUM_ENVS, HORIZON, EPOCHS, MINIBATCHES = 8, 128, 4, 4
"""The peer has the same settings."""
FAMILIES = {"CartPole-v1": "grpo_fed/CartPole-v1"}
"""Tasks of which we have a vectorised version, whose numbers are equal to the last bit."""
WIDE = [109, 109]
"""Hidden units with which the shared blocks have 25,400 numbers, or 100 KB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("work", type=json.loads, help="JSON: task, clients, rounds, steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = CONTESTANTS[arguments.contestant](**arguments.work)
    print(json.dumps({"round_seconds": list(seconds), "peak_mb": peak_mb()}))


def run_ours(task: str, clients: int, rounds: int, steps: int) -> Iterator[float]:
    """Run the local engine as a user does, but without a run folder, because the peer writes no files either."""
    clock = RoundClock()
    run(make_scenario(FAMILIES.get(task, task), clients, rounds + 1, steps), watch=clock)
    return clock.seconds


def run_in_turn(task: str, clients: int, rounds: int, steps: int) -> Iterator[float]:
    """Train the same clients one after another in one process, and average them."""
    settings = make_scenario(FAMILIES.get(task, task), clients, rounds, steps)
    learners = [StackedLearner([task], settings) for task in resolve_tasks(settings)]
    for _ in range(rounds):
        began = time.perf_counter()
        mean = StreamingMean()
        for learner in learners:
            (report,) = learner.train(steps)
            mean.add(learner.parameters[0], report.steps)
        for learner in learners:
            learner.parameters[0].copy_(mean.result())
        yield time.perf_counter() - began


def run_idle(task: str, clients: int, rounds: int, steps: int) -> Iterator[float]:
    """Run a federation whose clients do no work: they answer with slightly different shared blocks."""
    settings = make_scenario(FAMILIES["CartPole-v1"], clients, rounds + 1, steps, WIDE)
    shared_blocks, clock = resolve_shared_blocks(settings), RoundClock()
    executor, schedule = InProcessExecutor(IdleClients), ChunkSchedule(make_chunks([shared_blocks.clients], workers=0))
    with LocalGrid(shared_blocks.clients, executor, Codec(shared_blocks, settings), schedule) as grid:
        Federation(settings, shared_blocks, GridTransport(grid, shared_blocks, settings, grid.nodes)).run(clock)
    return clock.seconds


CONTESTANTS = {"ours": run_ours, "in-turn": run_in_turn, "idle": run_idle}


class RoundClock:
    """Records when each round ended. The last round is left out, since the clients are evaluated after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, record: RoundRecord) -> None:
        if record.server is not None and any(client.failure for client in record.clients):
            raise RuntimeError(f"round {record.round}: {next(client for client in record.clients if client.failure)}")
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> Iterator[float]:
        return (after - before for before, after in pairwise(self.times[:-1]))


class IdleClients:
    """Answers for clients that do nothing."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._sent: np.ndarray | None = None
        self._answer: Trained | None = None

    def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
        return {name: self._one(instruction) for name, instruction in instructions.items()}

    def _one(self, instruction: Instruction) -> Answer:
        summary = EvaluationSummary(0.0, 0.0, 0.0, 0.0, 1, 1.0)
        match instruction:
            case Train(start=start):
                if self._answer is None or self._sent is not start.shared:
                    # Every number differs from what was sent, since unchanged blocks would not be sent back.
                    self._sent = start.shared
                    self._answer = Trained(start.shared + np.float32(1e-3), NUM_ENVS * HORIZON, 0, 0.0, 0.0, {})
                return self._answer
            case Measure(fractions=fractions):
                return Measured((0.0,) * len(fractions))
            case Evaluate():
                return Evaluated(summary)

    def close(self) -> None:
        pass


def make_scenario(env: str, clients: int, rounds: int, steps: int, hidden: Sequence[int] = (64, 64)) -> Scenario:
    """Make the scenario: FedAvg over the whole policy, as the peer does; one evaluation episode before and after."""
    settings: dict[str, Any] = {
        "name": "federation",
        "method": "fedavg",
        "rounds": rounds,
        "steps": steps,
        "device": "cpu",
        "policy": {"hidden": list(hidden)},
        "rollout": {"num_envs": NUM_ENVS, "horizon": HORIZON},
        "objective": {"preset": "ppo", "epochs": EPOCHS, "minibatches": MINIBATCHES},
        "evaluate": {"episodes": 1},
        "clients": [{"name": "client", "env": env, "count": clients}],
    }
    return Scenario.model_validate(settings)


if __name__ == "__main__":
    main()
