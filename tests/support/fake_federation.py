"""A local grid with fake clients, and what its clients were asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grpo_fed.engines.local.grid import LocalGrid
from grpo_fed.engines.local.schedule import ChunkSchedule, make_chunks
from grpo_fed.engines.wire import Codec
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.engines.workers.handler import ClientFactory
from grpo_fed.engines.workers.pool import Executor, InProcessExecutor, WorkerPool
from grpo_fed.federation.messages import Answer, Start, Train
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario

Replies = dict[str, Answer | Failure]


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
