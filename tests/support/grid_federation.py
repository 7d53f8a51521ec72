"""A federation of three clients on an in-memory grid, each of which answers with a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import Message, RecordDict

from grpo_fed.engines.wire import Codec
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.messages import Answer, Instruction, Measure, Measured, Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario
from tests.support.in_memory_grid import Client, InMemoryGrid

SCENARIO = Scenario.loads("""
name = "three-carts"
rounds = 9
[policy]
hidden = [2]
[[clients]]
name = "dog"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "ant"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "cat"
env = "grpo_fed/CartPole-v1"
""")
SHARED_BLOCKS = resolve_shared_blocks(SCENARIO)
CODEC = Codec(SHARED_BLOCKS, SCENARIO)
SHARED = SHARED_BLOCKS.initial.numpy()
NODES = {11: "ant", 12: "cat", 13: "dog"}
ALL_ANSWERS = [("ant", 1.0), ("cat", 2.0), ("dog", 3.0)]


def answer_to(instruction: Instruction, number: float) -> Answer:
    match instruction:
        case Train():
            return Trained(instruction.start.shared + np.float32(number), 100, 2, 0.0, 0.0, {})
        case Measure():
            return Measured(tuple(number for _ in instruction.fractions))
        case _:
            raise AssertionError(instruction)


def answers_with(number: float) -> Client:
    def client(message: Message) -> RecordDict:
        instruction = CODEC.read_instruction(message.metadata.message_type, message.content)
        return CODEC.write_answer(instruction, answer_to(instruction, number))

    return client


def make_grid(streams: bool = False, **others: Client) -> InMemoryGrid:
    """Make a grid on which ant, cat and dog answer 1, 2 and 3, but for those given here."""
    clients = {name: answers_with(number) for number, name in enumerate(NODES.values(), 1)} | others
    return InMemoryGrid({node: clients[name] for node, name in NODES.items()}, streams)


def make_transport(grid: InMemoryGrid, nodes: Mapping[int, str] | None = NODES) -> GridTransport:
    return GridTransport(grid, SHARED_BLOCKS, SCENARIO, nodes)


def train(round: int = 1, names: Iterable[str] = ("dog", "cat", "ant")) -> dict[str, Instruction]:
    return {name: Train(Start("run", round, SHARED), 0.0, 0.1) for name in names}


def mean_step(answer: Answer | Failure) -> float:
    assert isinstance(answer, Trained)
    return round(float((answer.point - SHARED).mean()), 4)


def mean_steps(answers: Iterable[tuple[str, Answer | Failure]]) -> list[tuple[str, float]]:
    """Return each client's number, in the order of the answers."""
    return [(name, mean_step(answer)) for name, answer in answers]
