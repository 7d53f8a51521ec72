"""A client leaves learned groups: the same after a stop, and where messages go over a grid of Flower's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

import clients.app
from grpo_fed.engines.start import resume, run
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from tests.federation.test_departures import without_times
from tests.support.in_memory_grid import InMemoryGrid, enter_run
from tests.support.small_federation import shared_blocks

TEXT = """
name = "rewired"
rounds = 6
steps = 512
seed = 1
device = "cpu"
policy = { hidden = [16], groups = { "*" = "learned" } }
rollout = { num_envs = 8, horizon = 64 }
objective = { learning_rate = 1e-2, epochs = 4, minibatches = 4 }
proximity = { mode = "off" }
merge = { rule = "persistence", confirm = "evidence", rejoin = 0 }
evaluate = { episodes = 4 }
checkpoint = { keep = 9 }
[[clients]]
name = "cart"
count = 3
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "rewired"
env = "grpo_fed/CartPole-v1"
kwargs = { permute = [2, 3, 0, 1] }
"""
SCENARIO = Scenario.loads(TEXT)
SENSORS = {f"torso.0.weight:columns[{sensor}]" for sensor in range(4)}
LEAVES = 4
"""The first round in which evidence is enough."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("local") / "run"
    return folder, run(SCENARIO, folder, workers=0)


def test_a_client_leaves_the_weights_of_sensors_and_shares_the_rest_of_their_layer(local: tuple[Path, Result]):
    _, result = local
    left = result.clients["rewired"].departures
    assert {*left}
    assert {*left} <= SENSORS, "the bias, and all else, stays shared"
    assert {departure.round for departure in left.values()} == {LEAVES}
    assert not any(result.clients[f"cart-{number}"].departures for number in range(3))


def test_a_stopped_run_learns_the_same_groups_and_ends_with_the_same_bits(local: tuple[Path, Result], tmp_path: Path):
    def interrupt(record: RoundRecord) -> None:
        if record.round == LEAVES:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SCENARIO, tmp_path / "run", watch=interrupt, workers=0)
    result = resume(tmp_path / "run")
    assert list(without_times(tmp_path / "run")) == list(without_times(local[0]))
    assert result.clients["rewired"].departures == local[1].clients["rewired"].departures
    name = "checkpoints/round-0006/shared.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (local[0] / name).read_bytes()


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryGrid]:
    """A grid with a node for each client, each of which has the client app in a module of its own."""
    enter_run(monkeypatch)
    spec = importlib.util.spec_from_file_location("client_app_of_nodes", clients.app.__file__)
    assert spec is not None
    assert spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    contexts = {
        number: Context(1, 2, {"client": name, "state": str(tmp_path / name)}, RecordDict(), {"scenario": TEXT})
        for number, name in enumerate(("cart-0", "cart-1", "cart-2", "rewired"), 7)
    }
    yield InMemoryGrid(
        {number: (lambda message, own=own: app.app(message, own).content) for number, own in contexts.items()}
    )
    app.node.close()


def test_nodes_of_flower_agree_with_the_local_engine_on_what_is_left(
    nodes: InMemoryGrid, local: tuple[Path, Result], tmp_path: Path
):
    resolved = resolve_shared_blocks(SCENARIO)
    over_nodes = Federation(SCENARIO, resolved, GridTransport(nodes, resolved, SCENARIO), tmp_path / "run")
    result = over_nodes.run()
    left = {name: {*client.departures} for name, client in result.clients.items()}
    assert left == {name: {*client.departures} for name, client in local[1].clients.items()}
    assert left["rewired"]
    own, expected = (shared_blocks(folder, round=6) for folder in (tmp_path / "run", local[0]))
    for slot in resolved.layout.slots:
        # Clients that learn in a stack differ from single ones in the last bits, which six rounds of steps enlarge.
        np.testing.assert_allclose(own[slot.name], expected[slot.name], atol=1e-4)
