"""Clients that learn nothing and fail on request, and a local grid of them: what the local engine is tested with."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fed.engines.local.grid import LocalGrid
from grpo_fed.engines.local.schedule import ChunkSchedule, make_chunks
from grpo_fed.engines.wire import Codec
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.engines.workers.handler import ClientFactory
from grpo_fed.engines.workers.pool import Executor, InProcessExecutor, WorkerPool
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario

Replies = dict[str, Answer | Failure]

# Clients -------------------------------------------------------------------------------------------------------------


class FakeClients:
    """Answers with numbers made from the clients' names.

    settings: `log`, a file that gets a line for each call: the round, the process id, how many different arrays the
    shared blocks of the call were, and the names of the clients. `faults`: by client and round, how the client fails.
    `seconds`: how long a call takes.
    """

    def __init__(self, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.names = names
        self.log = Path(settings["log"])
        self.faults: Mapping[str, Mapping[str, str]] = settings.get("faults", {})
        self.seconds: float = settings.get("seconds", 0.0)

    def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
        """Log the call, fail if a client has a fault in this round, else answer."""
        round = next(iter(instructions.values())).start.round
        arrays = len({id(instruction.start.shared) for instruction in instructions.values()})
        with self.log.open("a") as file:
            file.write(json.dumps([round, os.getpid(), arrays, *instructions]) + "\n")
        time.sleep(self.seconds)
        for name in instructions:
            fail(self.faults.get(name, {}).get(str(round)), name)
        return {name: answer_of(name, instruction) for name, instruction in instructions.items()}

    def close(self) -> None:
        """There is nothing to close."""


def fail(how: str | None, name: str) -> None:
    """Fail in one of several ways, or not at all."""
    match how:
        case "raise":
            raise RuntimeError(f"{name} fails on request")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "print":
            print(f"{name} prints")


def answer_of(name: str, instruction: Instruction) -> Answer:
    """Make an answer that no other client would give."""
    match instruction:
        case Train(start=start):
            return Trained(start.shared + np.float32(step_of(name)), 1, 1, 0.5, 0.25, {"losses/entropy": 0.125})
        case Measure(fractions=fractions):
            return Measured(tuple(sum(of_blocks) * step_of(name) for of_blocks in fractions))
        case Evaluate():
            return Evaluated(EvaluationSummary(step_of(name), 0.0, step_of(name), step_of(name), 1, 1.0))


def step_of(name: str) -> float:
    """Make a small number from a client's name: how far the client moves all its parameters."""
    return sum(name.encode()) / 1024


# A grid of them ------------------------------------------------------------------------------------------------------


def scenario_of(clients: int) -> Scenario:
    """Make a scenario with so many CartPoles, for the shapes of their policies."""
    return Scenario.model_validate(
        {
            "name": "local",
            "method": "fedavg",
            "rounds": 9,
            "steps": 64,
            "policy": {"hidden": [4]},
            "rollout": {"num_envs": 2, "horizon": 32},
            "evaluate": {"episodes": 2},
            "clients": [{"name": "cart", "env": "grpo_fed/CartPole-v1", "count": clients}],
        }
    )


class FakeFederation:
    """A local grid with fake clients, a transport over it, and the log of the calls."""

    def __init__(self, folder: Path, clients: int, workers: int, **settings: Any) -> None:
        scenario = scenario_of(clients)
        self.shared_blocks = resolve_shared_blocks(scenario)
        self.names = self.shared_blocks.clients
        self.log = folder / "calls.jsonl"
        self.log.touch()
        self.codec = Codec(self.shared_blocks, scenario)
        factory = ClientFactory("tests.support.fake_clients:FakeClients", {"log": str(self.log), **settings})
        chunks = make_chunks([self.names], workers)
        executor: Executor = WorkerPool(min(workers, len(chunks)), factory) if workers else InProcessExecutor(factory)
        self.grid = LocalGrid(self.names, executor, self.codec, ChunkSchedule(chunks, workers))
        self.transport = GridTransport(self.grid, self.shared_blocks, scenario, self.grid.nodes)

    def __enter__(self) -> FakeFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.grid.close()

    def start(self, round: int) -> Start:
        """Make what every instruction begins with: a round, and the initial shared blocks."""
        return Start("run", round, self.shared_blocks.initial.numpy())

    def train(self, round: int, deadline: float | None = 60.0) -> Replies:
        """Train all clients for a round."""
        start = self.start(round)
        return dict(self.transport.send({name: Train(start, 0.0, 0.5) for name in self.names}, deadline))

    def jobs(self, round: int) -> list[list[str]]:
        """List which clients were asked together in a round, in the order of the calls."""
        return [names for called_in, _, _, *names in self.calls() if called_in == round]

    def pids(self) -> set[int]:
        """Return the ids of all processes in which clients were called."""
        return {pid for _, pid, *_ in self.calls()}

    def calls(self) -> list[Any]:
        """Read the lines of the log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def failures(replies: Mapping[str, Answer | Failure]) -> dict[str, str]:
    """Return the kind of failure of each client that failed."""
    return {name: reply.kind for name, reply in replies.items() if isinstance(reply, Failure)}


def partition(jobs: Iterable[Iterable[str]]) -> list[list[str]]:
    """Return the jobs without their order and that of their clients."""
    return sorted(map(sorted, jobs))
