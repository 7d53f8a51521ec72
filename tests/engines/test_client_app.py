from __future__ import annotations

import fcntl
import importlib.util
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import clients.app
from grpo_fed.engines.flower import node as node_module
from grpo_fed.engines.flower.app_folder import scenario_from_config
from grpo_fed.engines.flower.withheld_errors import WithheldError
from grpo_fed.engines.wire import Codec, InvalidMessageError, message_type, read_hello, write_shared_blocks
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.policies import load_policy
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks
from tests.support.in_memory_grid import Client, InMemoryGrid, enter_run

TEXT = """
name = "app"
rounds = 4
steps = 64
[policy]
hidden = [8]
[rollout]
num_envs = 4
horizon = 16
[normalise]
observations = true
[objective]
minibatches = 2
epochs = 2
[evaluate]
episodes = 4
[[clients]]
name = "cart"
count = 2
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "long"
env = "grpo_fed/CartPole-v1"
kwargs = { length = 0.9 }
"""
SCENARIO = Scenario.loads(TEXT)
SHARED_BLOCKS = resolve_shared_blocks(SCENARIO)
CODEC = Codec(SHARED_BLOCKS, SCENARIO)
SHARED = SHARED_BLOCKS.initial.numpy()
RUN = "app-1"


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    end(clients.app)


def end(process: ModuleType) -> None:
    """Do what happens when a process ends."""
    process.node.close()


def new_process() -> ModuleType:
    """Load the app as another process would, with a memory of its own."""
    spec = importlib.util.spec_from_file_location("another_app", clients.app.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def context(state: Path | None, text: str = TEXT, **node_config: str | int) -> Context:
    config = {**node_config, **({} if state is None else {"state": str(state)})}
    return Context(1, 2, config, RecordDict(), {"scenario": text})


def encode(instruction: Instruction) -> RecordDict:
    """Encode an instruction as a server does."""
    content = CODEC.write_instruction(instruction)
    content["shared_blocks"] = write_shared_blocks(SHARED_BLOCKS)
    return content


def ask(instruction: Instruction, context: Context, process: ModuleType = clients.app) -> Answer:
    """Let a node answer, and decode the answer as the server does."""
    message = Message(encode(instruction), 2, message_type(instruction))
    return CODEC.read_answer(instruction, process.app(message, context).content)


@contextmanager
def raises_withheld(kind: type[Exception], text: str) -> Iterator[None]:
    """Expect an exception whose text the client keeps for itself."""
    with pytest.raises(WithheldError, match=rf"^{kind.__name__} at grpo_fed/\w+/.*\.py:\d+; its text is in ") as raised:
        yield
    assert isinstance(raised.value.__cause__, kind)
    assert text in str(raised.value.__cause__)
    assert text not in str(raised.value)


def train(round: int, shared: np.ndarray = SHARED, departed: tuple[int, ...] = ()) -> Train:
    return Train(Start(RUN, round, shared, departed), (round - 1) / 4, round / 4)


def point_of(answer: Answer) -> np.ndarray:
    assert isinstance(answer, Trained)
    return answer.point


def values_of(summary: EvaluationSummary | None) -> tuple[float, ...]:
    return () if summary is None else (*astuple(summary)[:-2], *summary.adapted)


def test_a_node_answers_as_its_client_does(tmp_path: Path):
    node = context(tmp_path / "node", client="long")
    instructions: list[Instruction] = [
        Evaluate(Start(RUN, 0, SHARED), EvaluationPlan(0)),
        train(1),
        Measure(Start(RUN, 1, SHARED), SHARED + np.float32(0.05), ((1.0, 1.0), (0.5, 0.0), (0.0, 0.0))),
        Train(
            Start(RUN, 2, SHARED * np.float32(0.9)), 0.25, 0.5, measure_last_step=True, evaluate_first=EvaluationPlan(1)
        ),
        Evaluate(Start(RUN, 2, SHARED), EvaluationPlan(2, deterministic=False)),
    ]
    answers = [ask(instruction, node) for instruction in instructions]
    task = next(task for task in resolve_tasks(SCENARIO) if task.client == "long")
    itself = Clients(SCENARIO, SHARED_BLOCKS, [task], StateStore(tmp_path / "itself"))
    for instruction, answer in zip(instructions, answers, strict=True):
        expected = itself.answer({"long": instruction})["long"]
        match answer, expected:
            case Trained(), Trained():
                np.testing.assert_array_equal(answer.point, expected.point)
                assert (answer.steps, answer.episodes, answer.gain) == (64, expected.episodes, expected.gain)
                assert (answer.kl, values_of(answer.evaluation)) == (expected.kl, values_of(expected.evaluation))
            case Measured(), Measured():
                assert answer.kl == expected.kl
                assert answer.kl[0] > answer.kl[1] > answer.kl[2] == 0
            case Evaluated(), Evaluated():
                assert values_of(answer.summary) == values_of(expected.summary)
            case _:
                raise AssertionError(f"{answer} to {instruction}")
    itself.close()


def test_a_client_goes_on_after_its_process_has_ended(tmp_path: Path):
    staying, ending = context(tmp_path / "a", client="cart-0"), context(tmp_path / "b", client="cart-0")
    for round in (1, 2, 3):
        expected = point_of(ask(train(round, departed=(1,)), staying))
        process = new_process()
        np.testing.assert_array_equal(point_of(ask(train(round, departed=(1,)), ending, process)), expected)
        end(process)


def test_a_process_reads_what_another_wrote_in_between(tmp_path: Path):
    alone, by_turns = context(tmp_path / "a", client="cart-0"), context(tmp_path / "b", client="cart-0")
    expected = [point_of(ask(train(round), alone)) for round in (1, 2, 3, 4)]
    second_process = new_process()
    points = [
        point_of(ask(train(round), by_turns, clients.app if round % 2 else second_process)) for round in (1, 2, 3, 4)
    ]
    end(second_process)
    np.testing.assert_array_equal(points, expected)


def test_a_round_that_is_asked_for_again_has_the_same_answer(tmp_path: Path):
    node = context(tmp_path, client="cart-1")
    first = [point_of(ask(train(round), node)) for round in (1, 2)]
    np.testing.assert_array_equal([point_of(ask(train(round), node)) for round in (2,)], first[1:])
    np.testing.assert_array_equal([point_of(ask(train(round), node)) for round in (1, 2)], first)


def test_a_process_may_serve_several_clients_and_scenarios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = (context(tmp_path, client=name) for name in ("cart-0", "cart-1"))
    other_run = context(tmp_path / "other", TEXT.replace('name = "app"', 'name = "app"\nseed = 1'), client="cart-0")
    expected = [point_of(ask(train(1), node)) for node in (first, second, other_run)]
    assert not np.array_equal(expected[0], expected[1])
    assert not np.array_equal(expected[0], expected[2])
    end(clients.app)
    monkeypatch.setattr(node_module, "MAX_CLIENTS", 1)
    again = [point_of(ask(train(1), node)) for node in (first, second, other_run)]
    np.testing.assert_array_equal(again, expected)
    assert len(clients.app.node.loaded) == 1


@pytest.mark.parametrize(
    ("node_config", "name"),
    [
        ({"client": "long"}, "long"),
        ({"partition-id": 1}, "cart-1"),
        ({"client": "cart-0", "partition-id": 2}, "cart-0"),
        ({"client": "crat-0"}, "crat-0"),
    ],
)
def test_a_node_names_its_client(node_config: dict[str, str | int], name: str, capsys: pytest.CaptureFixture[str]):
    reply = clients.app.app(Message(RecordDict(), 2, "query.hello"), context(None, **node_config))
    assert read_hello(reply.content).client == name
    takes_no_part = "client crat-0 takes no part in the run of scenario app, which has cart-0, cart-1, long"
    assert (takes_no_part in capsys.readouterr().err) is (name == "crat-0")


@pytest.mark.parametrize(
    ("node_config", "given"),
    [
        ({}, "no client, partition-id = None"),
        ({"partition-id": 3}, "no client, partition-id = 3"),
        ({"partition-id": -1}, "no client, partition-id = -1"),
    ],
)
def test_a_node_without_a_client_raises_an_error(node_config: dict[str, str | int], given: str):
    with raises_withheld(ValueError, f"node-config says {given}; scenario app has cart-0, cart-1, long"):
        clients.app.app(Message(RecordDict(), 2, "query.hello"), context(None, **node_config))


def test_the_state_folder_is_the_nodes_the_environments_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRPO_FED_STATE", str(tmp_path / "environment"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "user"))
    ask(train(1), context(tmp_path / "node", client="cart-0"))
    ask(train(1), context(None, client="cart-0"))
    monkeypatch.delenv("GRPO_FED_STATE")
    ask(train(1), context(None, client="cart-0"))
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ask(train(1), context(None, client="cart-0"))
    folders = ["node", "environment", "user/grpo_fed", "home/.local/state/grpo_fed"]
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("round-0001.safetensors"))
    assert files == sorted(Path(folder) / RUN / "cart-0" / "round-0001.safetensors" for folder in folders)


def test_an_evaluated_policy_is_saved(tmp_path: Path):
    node = context(tmp_path, client="cart-1")
    ask(Evaluate(Start(RUN, 0, SHARED), EvaluationPlan(0)), node)
    assert not list(tmp_path.rglob("policies")), "before training there is nothing to save"
    ask(train(1), node)
    end = SHARED * np.float32(0.5)
    answer = ask(Evaluate(Start(RUN, 1, end), EvaluationPlan(1)), node)
    assert isinstance(answer, Evaluated)
    policy = load_policy(tmp_path / RUN, "cart-1")
    parameters = policy.parameters[0][SHARED_BLOCKS.columns_in(policy.policy.layout)]
    np.testing.assert_array_equal(parameters.numpy(), end)
    assert policy.predict(np.zeros(4, np.float32)) in (0, 1)
    assert policy.normaliser is not None


def test_a_run_without_a_scenario_has_two_carts():
    reply = clients.app.app(Message(RecordDict(), 2, "query.hello"), context(None, "", **{"partition-id": 0}))
    assert read_hello(reply.content).client == "cart-0"
    assert resolve_shared_blocks(scenario_from_config("")).clients == ("cart-0", "cart-1")


def test_an_invalid_message_is_refused_and_writes_nothing(tmp_path: Path):
    node = context(tmp_path, client="cart-0")
    content = encode(train(1))
    content["instruction"]["run"] = "../elsewhere"
    with raises_withheld(InvalidMessageError, "instruction.run is '../elsewhere'"):
        clients.app.app(Message(content, 2, "train"), node)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_client_goes_on_after_an_error(tmp_path: Path):
    node = context(tmp_path, client="cart-0")
    with raises_withheld(ValueError, "client cart-0: it has no states of round 1 to measure on"):
        ask(Measure(Start(RUN, 1, SHARED), SHARED + 1, ((1.0, 1.0),)), node)
    assert np.isfinite(point_of(ask(train(1), node))).all()


def test_a_message_waits_for_a_busy_process_of_its_client(tmp_path: Path):
    node = context(tmp_path, client="cart-0")
    ask(train(1), node)
    with (tmp_path / RUN / "cart-0" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done: list[float] = []
        thread = threading.Thread(target=lambda: (ask(train(2), node), done.append(time.monotonic())))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        freed = time.monotonic()
    thread.join(30)
    assert done
    assert done[0] > freed


def test_nodes_and_clients_in_one_process_end_alike(tmp_path: Path):
    names = dict(enumerate(SHARED_BLOCKS.clients, 7))
    nodes = {number: context(tmp_path / name, client=name) for number, name in names.items()}
    grid = InMemoryGrid(
        {number: (lambda message, node=node: clients.app.app(message, node).content) for number, node in nodes.items()}
    )
    over_nodes = Federation(
        SCENARIO, SHARED_BLOCKS, GridTransport(grid, SHARED_BLOCKS, SCENARIO), evaluate_with_next_round=True
    )
    result = over_nodes.run()

    tasks, home = resolve_tasks(SCENARIO), StateStore(tmp_path / "together")
    together = Clients(SCENARIO, SHARED_BLOCKS, tasks, home)

    def answer(name: str) -> Client:
        def client(message: Message) -> RecordDict:
            instruction = CODEC.read_instruction(message.metadata.message_type, message.content)
            return CODEC.write_answer(instruction, together.answer({name: instruction})[name])

        return client

    direct = InMemoryGrid({number: answer(name) for number, name in names.items()}, streams=True)
    over_clients = Federation(SCENARIO, SHARED_BLOCKS, GridTransport(direct, SHARED_BLOCKS, SCENARIO, names))
    expected = over_clients.run()
    together.close()
    np.testing.assert_array_equal(over_nodes.state.shared, over_clients.state.shared)
    assert not np.array_equal(over_nodes.state.shared, SHARED)
    assert (result.rounds, result.missing) == (expected.rounds, expected.missing) == (4, {})
    assert result.clients == expected.clients
    assert result.bytes_up > 4 * 3 * 4 * SHARED_BLOCKS.size
    saved = [load_policy(next((tmp_path / name).iterdir()), name) for name in SHARED_BLOCKS.clients]
    saved_blocks = [policy.parameters[0][SHARED_BLOCKS.columns_in(policy.policy.layout)].numpy() for policy in saved]
    for name, shared in zip(SHARED_BLOCKS.clients, saved_blocks, strict=True):
        departed = SHARED_BLOCKS.columns_of_groups(over_nodes.state.departed.get(name, ())).numpy()
        np.testing.assert_array_equal(shared[~departed], over_nodes.state.shared[~departed])
