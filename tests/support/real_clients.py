"""A federation whose clients learn, in this process, with all that they were sent and answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Answer, Instruction, Train, Trained
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.runs.records import Failure, RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks


@dataclass
class RealTransport:
    """A transport with real clients, each with its own learner."""

    scenario: Scenario
    folder: Path
    bytes_up: int = 0
    bytes_down: int = 0
    sent: list[tuple[str, Instruction]] = field(default_factory=list)
    trained: list[tuple[str, int, Trained]] = field(default_factory=list)
    submitted: dict[str, Instruction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shared_blocks: SharedBlocks = resolve_shared_blocks(self.scenario)
        self.store = StateStore(self.folder, durable=False)
        self.clients = {
            task.client: Clients(self.scenario, self.shared_blocks, [task], self.store)
            for task in resolve_tasks(self.scenario)
        }

    def reachable(self) -> tuple[str, ...]:
        return self.shared_blocks.clients

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        for name in sorted(instructions):
            instruction = instructions[name]
            answer = self.clients[name].answer({name: instruction})[name]
            self.sent.append((name, instruction))
            if isinstance(answer, Trained):
                self.trained.append((name, instruction.start.round, answer))
            yield name, answer

    def submit(self, instructions: Mapping[str, Instruction]) -> None:
        self.submitted |= instructions

    def collect(self, timeout: float) -> list[tuple[str, Answer | Failure]]:
        submitted, self.submitted = self.submitted, {}
        return list(self.send(submitted, timeout))

    def federation(self, evaluate_with_next_round: bool = False) -> Federation:
        """Make a federation of these clients."""
        return Federation(self.scenario, self.shared_blocks, self, evaluate_with_next_round=evaluate_with_next_round)

    def shared(self, number: int) -> np.ndarray:
        """Return the shared blocks [S] that a round began with."""
        starts = (instruction.start for _, instruction in self.sent if isinstance(instruction, Train))
        return next(start.shared for start in starts if start.round == number)

    def parameters(self, run: str) -> dict[str, np.ndarray]:
        """Read every client's parameters after the last round."""
        states = {name: self.store.read(run, name, self.scenario.rounds) for name in self.clients}
        return {name: state.arrays["parameters"] for name, state in states.items() if state is not None}


def run(scenario: Scenario, folder: Path) -> tuple[Federation, RealTransport, list[RoundRecord]]:
    """Run a scenario to its end."""
    transport = RealTransport(scenario, folder)
    federation, records = transport.federation(), []
    federation.run(records.append)
    for clients in transport.clients.values():
        clients.close()
    return federation, transport, records
