"""What benchmarks/federation.py holds against each other, each run in a process of its own.

    python -m benchmarks.contestants ours '{"task": "CartPole-v1", "clients": 64, "rounds": 8, "steps": 2048}'

prints the seconds of each round and the process's peak memory as JSON. The peer's counterpart is
benchmarks/ray_peer/sb3_peer.
"""

import os

# Before torch and numpy load: one thread a process, since the matrices are small.
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
"""The peer's, too."""
FAMILIES = {"CartPole-v1": "grpo_fed/CartPole-v1"}
"""Tasks of which we have a version that steps many copies in one call, with the same numbers to the last bit."""
WIDE = [109, 109]
"""Hidden units with which the shared blocks are 25,400 numbers, 100 KB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("work", type=json.loads, help="JSON: task, clients, rounds, steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = CONTESTANTS[arguments.contestant](**arguments.work)
    print(json.dumps({"round_seconds": list(seconds), "peak_mb": peak_mb()}))


def ours(task: str, clients: int, rounds: int, steps: int) -> Iterator[float]:
    """The local engine, as a user runs it, but without a run folder: the peer writes nothing either."""
    clock = Clock()
    run(scenario(FAMILIES.get(task, task), clients, rounds + 1, steps), watch=clock)
    return clock.seconds


def in_turn(task: str, clients: int, rounds: int, steps: int) -> Iterator[float]:
    """The same clients in one process, each trained alone, one after another, and averaged."""
    settings = scenario(FAMILIES.get(task, task), clients, rounds, steps)
    fleets = [StackedLearner([one], settings) for one in resolve_tasks(settings)]
    for _ in range(rounds):
        began = time.perf_counter()
        mean = StreamingMean()
        for fleet in fleets:
            (report,) = fleet.train(steps)
            mean.add(fleet.parameters[0], report.steps)
        for fleet in fleets:
            fleet.parameters[0].copy_(mean.result())
        yield time.perf_counter() - began


def idle(task: str, clients: int, rounds: int, steps: int) -> Iterator[float]:
    """The whole of a federation but for the clients' work: they answer with what they were sent, and a bit more."""
    settings = scenario(FAMILIES["CartPole-v1"], clients, rounds + 1, steps, WIDE)
    commons, clock = resolve_shared_blocks(settings), Clock()
    executor, schedule = InProcessExecutor(Idle), ChunkSchedule(make_chunks([commons.clients], workers=0))
    with LocalGrid(commons.clients, executor, Codec(commons, settings), schedule) as grid:
        Federation(settings, commons, GridTransport(grid, commons, settings, grid.nodes)).run(clock)
    return clock.seconds


CONTESTANTS = {"ours": ours, "in-turn": in_turn, "idle": idle}


class Clock:
    """Told of every round, it knows how long each took. The last one is left out: after it clients play."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, note: RoundRecord) -> None:
        if note.server is not None and any(one.failure for one in note.clients):
            raise RuntimeError(f"round {note.round}: {next(one for one in note.clients if one.failure)}")
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> Iterator[float]:
        return (after - before for before, after in pairwise(self.times[:-1]))


class Idle:
    """Clients that do nothing."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._sent: np.ndarray | None = None
        self._answer: Trained | None = None

    def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
        return {name: self._one(instruction) for name, instruction in instructions.items()}

    def _one(self, instruction: Instruction) -> Answer:
        played = EvaluationSummary(0.0, 0.0, 0.0, 0.0, 1, 1.0)
        match instruction:
            case Train(start=start):
                if self._answer is None or self._sent is not start.shared:
                    # Every number differs from what was sent, else it would not be sent back at all.
                    self._sent = start.shared
                    self._answer = Trained(start.shared + np.float32(1e-3), NUM_ENVS * HORIZON, 0, 0.0, 0.0, {})
                return self._answer
            case Measure(fractions=trials):
                return Measured((0.0,) * len(trials))
            case Evaluate():
                return Evaluated(played)

    def close(self) -> None:
        pass


def scenario(env: str, clients: int, rounds: int, steps: int, hidden: Sequence[int] = (64, 64)) -> Scenario:
    """FedAvg over all of the policy, as the peer's; clients play one episode before and after all rounds."""
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
