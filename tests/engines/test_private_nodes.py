"""With privacy, nodes that each have a process and a scenario of their own end as clients in one process do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import clients.app
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.results import Result
from grpo_fed.scenario.own_arguments import withhold_arguments
from grpo_fed.scenario.scenario import Scenario
from tests.support.in_memory_grid import Client, InMemoryGrid, enter_run
from tests.support.real_clients import RealTransport
from tests.support.small_federation import TINY

FEDAVG = ("method=fedavg", "clients.0.count=2")


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    enter_run(monkeypatch)
    yield
    clients.app.node.close()


def over_nodes(scenario: Scenario, folder: Path) -> tuple[np.ndarray, Result]:
    """Run over the app that Flower starts on every node, with the node's own scenario."""
    shared_blocks = resolve_shared_blocks(scenario)

    def node(name: str) -> Client:
        config = {"client": name, "state": str(folder / name)}
        own = {"scenario": withhold_arguments(scenario.dumps(), name)}

        def answer(message: Message) -> RecordDict:
            return clients.app.app(message, Context(1, 2, config, RecordDict(), own)).content

        return answer

    grid = InMemoryGrid({number: node(name) for number, name in enumerate(shared_blocks.clients, 7)})
    transport = GridTransport(grid, shared_blocks, scenario)
    federation = Federation(scenario, shared_blocks, transport, evaluate_with_next_round=True)
    result = federation.run()
    return federation.state.shared, result


@pytest.mark.parametrize(
    "overrides",
    [
        ("privacy.epsilon=8",),
        ("privacy.epsilon=8", "privacy.noise=local"),
        ("privacy.secure=true",),
        ("privacy.epsilon=8", "privacy.secure=true", "privacy.metrics=withheld"),
    ],
    ids=["budget", "local noise", "masks", "all together"],
)
def test_nodes_end_as_clients_in_one_process_do(tmp_path: Path, overrides: tuple[str, ...]):
    scenario = Scenario.loads(TINY, overrides=[*FEDAVG, *overrides])
    shared, result = over_nodes(scenario, tmp_path / "nodes")
    transport = RealTransport(scenario, tmp_path / "here")
    federation = transport.federation(evaluate_with_next_round=True)
    expected = federation.run()
    for each in transport.clients.values():
        each.close()
    np.testing.assert_array_equal(shared, federation.state.shared)
    assert not np.array_equal(shared, federation.shared_blocks.initial)
    assert (result.rounds, result.missing, result.privacy) == (expected.rounds, {}, expected.privacy)
    assert result.score_mean == expected.score_mean
