"""A federation in which neither the server nor any other client has the packages of a client's task."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict

import clients.app
from grpo_fed.engines import wire
from grpo_fed.engines.flower.discovery import discover_shared_blocks
from grpo_fed.engines.wire import Hello
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation import participation
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import TASK_SHAPES, SharedBlocks, read_task_shapes, resolve_shared_blocks
from grpo_fed.runs import checkpoint
from grpo_fed.runs.folder import read_engine_state
from grpo_fed.runs.history import read_history
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_task
from grpo_fed.tasks.task import MissingPackageError, TaskShape
from tests.support.in_memory_grid import Client, InMemoryGrid, enter_run

ELSEWHERE = """
import gymnasium
from gymnasium.envs.classic_control import AcrobotEnv

gymnasium.register("Elsewhere-v0", entry_point=AcrobotEnv, max_episode_steps=40)
"""
TEXT = """
name = "apart"
rounds = 3
steps = 64
[policy]
hidden = [8]
adapter = 3
shared = ["torso.*"]
[rollout]
num_envs = 4
horizon = 16
[objective]
minibatches = 2
epochs = 2
[evaluate]
episodes = 4
[round]
deadline = 30
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "bot"
env = "elsewhere:Elsewhere-v0"
"""
SCENARIO = Scenario.loads(TEXT)
CART, BOT = TaskShape(4, "categorical", (2,), 500), TaskShape(6, "categorical", (3,), 40)


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    clients.app.node.close()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The folder of the packages on the bot's machine."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "elsewhere.py").write_text(ELSEWHERE)
    return tmp_path / "packages"


@contextmanager
def installed(packages: Path) -> Iterator[None]:
    """Pretend that these packages are installed on this machine."""
    sys.path.insert(0, str(packages))
    try:
        yield
    finally:
        sys.path.remove(str(packages))
        sys.modules.pop("elsewhere", None)
        gymnasium.registry.pop("Elsewhere-v0", None)


def node(name: str, state: Path, packages: Path | None = None, scenario: Scenario = SCENARIO) -> Client:
    """Make a node that runs the client's app on a machine with these packages."""
    config = {"client": name, "state": str(state / name)}
    context = Context(1, 2, config, RecordDict(), {"scenario": scenario.dumps()})

    def client(message: Message) -> RecordDict | Error:
        try:
            if packages is None:
                return clients.app.app(message, context).content
            with installed(packages):
                return clients.app.app(message, context).content
        except ValueError as error:
            return Error(2, f"{type(error)}:<'{error}'>")

    return client


def reports(name: str, shape: TaskShape | None) -> Client:
    return lambda _: wire.write_hello(Hello(name, shape))


def assert_same(actual: SharedBlocks, expected: SharedBlocks) -> None:
    assert actual.digest == expected.digest
    assert actual.clients == expected.clients
    assert actual.max_episode_steps == expected.max_episode_steps
    np.testing.assert_array_equal(actual.initial, expected.initial)


def run(scenario: Scenario, grid: InMemoryGrid, folder: Path | None = None) -> tuple[Federation, Result]:
    """Run a federation as the server's app does."""
    registry = NodeRegistry(grid, ["cart", "bot"])
    shared_blocks, engine = discover_shared_blocks(scenario, registry, {})
    federation = Federation(
        scenario,
        shared_blocks,
        GridTransport(grid, shared_blocks, scenario, registry),
        folder,
        evaluate_with_next_round=True,
        engine=engine,
    )
    return federation, federation.run()


def test_clients_report_the_shapes_of_their_tasks(tmp_path: Path, packages: Path):
    hello = Message(RecordDict(), 2, "query.hello")
    assert wire.read_hello(node("cart", tmp_path)(hello)) == Hello("cart", CART)
    assert wire.read_hello(node("bot", tmp_path, packages)(hello)) == Hello("bot", BOT)
    assert wire.read_hello(node("bot", tmp_path)(hello)) == Hello("bot", None), "it cannot make its task"


def test_the_server_finds_the_shared_blocks_without_the_packages(packages: Path):
    with installed(packages):
        expected = resolve_shared_blocks(SCENARIO)
    with pytest.raises(MissingPackageError, match=r"client bot: .* elsewhere cannot be imported"):
        resolve_shared_blocks(SCENARIO)
    registry = NodeRegistry(InMemoryGrid({7: reports("bot", BOT)}), ["cart", "bot"])
    shared_blocks, state = discover_shared_blocks(SCENARIO, registry, {})
    assert_same(shared_blocks, expected)
    assert shared_blocks.max_episode_steps == 500
    assert state == {"forms": {"cart": asdict(CART), "bot": asdict(BOT)}}
    again, _ = discover_shared_blocks(
        SCENARIO, NodeRegistry(InMemoryGrid({}), ["cart", "bot"]), state
    )  # a run that goes on asks no client
    assert_same(again, expected)


def test_a_server_with_all_packages_waits_for_no_client(packages: Path):
    with installed(packages):
        shared_blocks, state = discover_shared_blocks(SCENARIO, NodeRegistry(InMemoryGrid({}), ["cart", "bot"]), {})
        assert_same(shared_blocks, resolve_shared_blocks(SCENARIO))
    assert state == {}


def test_each_client_needs_its_own_packages_alone(tmp_path: Path, packages: Path):
    grid = InMemoryGrid({7: node("cart", tmp_path / "apart"), 8: node("bot", tmp_path / "apart", packages)})
    federation, result = run(SCENARIO, grid, tmp_path / "run")
    assert result.missing == {}
    assert {name: client.env_steps for name, client in result.clients.items()} == {"cart": 192, "bot": 192}
    assert read_history(tmp_path / "run").block_of_group == {"torso.0": "torso.0"}
    saved = checkpoint.latest(tmp_path / "run")
    assert saved is not None
    assert (
        read_task_shapes(saved.parts["engine"])
        == read_task_shapes(read_engine_state(tmp_path / "run"))
        == {"cart": CART, "bot": BOT}
    )

    with installed(packages):
        together = InMemoryGrid({7: node("cart", tmp_path / "together"), 8: node("bot", tmp_path / "together")})
        expected, same = run(SCENARIO, together)
    np.testing.assert_array_equal(federation.state.shared, expected.state.shared)
    assert not np.array_equal(federation.state.shared, federation.shared_blocks.initial)
    assert result.clients == same.clients


def test_a_client_that_cannot_make_its_task_reports_why(tmp_path: Path, packages: Path):
    scenario = Scenario.loads(TEXT, overrides=["rounds=1", "privacy.errors=text"])
    grid = InMemoryGrid({7: node("cart", tmp_path), 8: node("bot", tmp_path, scenario=scenario)})
    _, result = run(scenario, grid)
    assert result.clients["cart"].env_steps == 64
    assert {kind for _, kind, _ in result.missing["bot"]} == {"raised"}
    assert "elsewhere cannot be imported" in result.missing["bot"][0][2]


def test_a_late_client_with_other_shared_blocks_fails(tmp_path: Path, packages: Path):
    scenario = Scenario.loads(
        TEXT, overrides=['policy.shared=["*"]', "round.deadline=0.3", "rounds=2", "privacy.errors=text"]
    )
    grid = InMemoryGrid({7: node("cart", tmp_path, scenario=scenario)})
    registry = NodeRegistry(grid, ["cart", "bot"])
    shared_blocks, _ = discover_shared_blocks(scenario, registry, {})
    assert shared_blocks.blocks == ("adapter", "torso.0", "actor", "critic"), "all that the cart has"
    grid.clients[8] = node("bot", tmp_path, packages, scenario)
    result = Federation(
        scenario, shared_blocks, GridTransport(grid, shared_blocks, scenario, registry), evaluate_with_next_round=True
    ).run()
    assert result.clients["cart"].env_steps == 128
    _, kind, reason = result.missing["bot"][-1]
    assert kind == "raised"
    assert "in other shapes or groups than this client has them" in reason


def test_a_client_that_is_waited_for_is_named_again_and_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(participation, "SOON", 0.05)
    monkeypatch.setattr(participation, "LATER", 0.25)
    scenario = Scenario.loads(TEXT, overrides=["round.deadline=0.5"])
    shared_blocks, _ = discover_shared_blocks(scenario, NodeRegistry(InMemoryGrid({}), ["cart", "bot"]), {})
    cure = "start them with `grpo-fed deploy client`; `grpo-fed deploy status` shows who is connected"
    assert caplog.messages == [f"waiting for bot; {cure}"] * 2
    assert shared_blocks.size == 3 * 8 + 8, "the cart's torso, which the server can make"


def test_a_server_that_knows_no_task_raises_an_error():
    scenario = Scenario.loads(TEXT, overrides=["round.deadline=0.1"])
    (bot,) = (settings for settings in scenario.clients if settings.name == "bot")
    alone = scenario.model_copy(update={"clients": [bot]})
    with pytest.raises(ValueError, match=r"no client reported its task within round\.deadline = 0\.1 seconds"):
        discover_shared_blocks(alone, NodeRegistry(InMemoryGrid({}), ["bot"]), {})


def test_a_users_own_network_needs_all_tasks_on_the_server():
    scenario = Scenario.loads(TEXT, overrides=['policy.module="torch.nn:Linear"', "policy.adapter=0"])
    with pytest.raises(MissingPackageError, match="elsewhere cannot be imported"):
        discover_shared_blocks(scenario, NodeRegistry(InMemoryGrid({7: reports("bot", BOT)}), ["cart", "bot"]), {})


def test_one_task_is_made_without_the_others(packages: Path):
    assert resolve_task(SCENARIO, "cart").shape == CART
    with pytest.raises(MissingPackageError, match="client bot"):
        resolve_task(SCENARIO, "bot")
    with installed(packages):
        assert resolve_task(SCENARIO, "bot").shape == BOT
    assert read_task_shapes({}) == {}


@pytest.mark.parametrize(
    "saved", [5, {"ant": 5}, {"ant": {}}, {"ant": {"sizes": 3}}, {"ant": {"sizes": ["x"]}}, {"ant": {"sizes": [2]}}]
)
def test_damaged_task_shapes_are_an_error_for_users(saved: object):
    with pytest.raises(ValueError, match="the shapes of the tasks that the run saved are damaged"):
        read_task_shapes({TASK_SHAPES: saved})
