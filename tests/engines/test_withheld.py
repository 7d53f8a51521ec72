"""What does not leave a client: the text of its exceptions; and what does not reach it: other clients' arguments."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.run_pb2 import GetRunResponse
from flwr.superlink.routers.fleet.router import router

import clients.app
from grpo_fed.engines.flower import own_scenario
from grpo_fed.engines.flower.own_scenario import OwnScenario
from grpo_fed.engines.flower.withheld_errors import WithheldError, withhold
from grpo_fed.engines.resident.run_configs import RunConfigs
from grpo_fed.engines.wire.flower_private import GET_RUN, OWN_CLIENT, pack
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.messages import Evaluate, EvaluationPlan, Start
from grpo_fed.federation.rounds import Federation
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.own_arguments import digest_entry, withhold_arguments
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario
from tests.support.in_memory_grid import InMemoryGrid, enter_run

SECRET = "it will not move"
"""What the environment says when it raises."""
TEXT = """
name = "withheld"
method = "fedavg"
rounds = 2
steps = 32
[policy]
hidden = [4]
[rollout]
num_envs = 2
horizon = 16
[evaluate]
episodes = 1
step_limit = 9
[[clients]]
name = "a"
env = "tests.support.failing_envs:Failing-v0"
kwargs = {{ when = "{when}" }}
[[clients]]
name = "b"
env = "CartPole-v1"
kwargs = {{ sutton_barto_reward = true }}
wrappers = [{{ path = "gymnasium.wrappers:TransformReward", kwargs = {{ func = "password" }} }}]
[[clients]]
name = "c"
count = 2
env = "grpo_fed/CartPole-v1"
spread = {{ length = [0.3, 0.7] }}
changes = [{{ round = 2, kwargs = {{ force_mag = 11.5 }} }}]
"""


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    enter_run(monkeypatch)
    yield
    clients.app.node.close()


def run_with_a_failing_client(tmp_path: Path, *overrides: str) -> tuple[str, bytes]:
    """Run two rounds over nodes, whose first client raises; return why it was missing, and all that nodes sent."""
    when = tmp_path / "when"
    text = TEXT.format(when=when).replace('wrappers = [{ path = "gymnasium', "# ")
    scenario = Scenario.loads(text, overrides=overrides)
    shared_blocks, sent = resolve_shared_blocks(scenario), bytearray()

    def node(name: str) -> Any:
        context = Context(1, 2, {"client": name, "state": str(tmp_path / name)}, RecordDict(), {})
        context.run_config = {"scenario": withhold_arguments(scenario.dumps(), name)}

        def answer(message: Message) -> RecordDict | Error:
            if message.metadata.message_type == "train":
                when.touch()
            try:
                content = clients.app.app(message, context).content
            except Exception as error:  # noqa: BLE001, as Flower reports it
                sent.extend(str(error).encode())
                return Error(2, f"{type(error)}:<'{error}'>")
            sent.extend(pack(content).tobytes())
            return content

        return answer

    grid = InMemoryGrid({number: node(name) for number, name in enumerate(shared_blocks.clients)})
    transport = GridTransport(grid, shared_blocks, scenario)
    result = Federation(scenario, shared_blocks, transport, tmp_path / "run", evaluate_with_next_round=True).run()
    assert result.clients["b"].env_steps == 64
    return result.missing["a"][0][2], bytes(sent)


def test_no_letter_of_an_exception_leaves_its_client(tmp_path: Path):
    reason, sent = run_with_a_failing_client(tmp_path)
    assert SECRET.encode() not in sent
    assert reason.startswith("WithheldError: TaskError at grpo_fed/")
    assert reason.endswith("its text is in errors/a.log among the states on the client's machine")
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert SECRET.encode() not in everything
    log = tmp_path / "a" / "errors" / "a.log"
    assert f"RuntimeError: {SECRET}" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_the_text_of_an_exception_leaves_where_the_scenario_says_so(tmp_path: Path):
    reason, sent = run_with_a_failing_client(tmp_path, "privacy.errors=text")
    assert SECRET in reason
    assert SECRET.encode() in sent
    assert not (tmp_path / "a" / "errors").exists()


def test_an_exception_that_cannot_be_written_down_is_withheld_all_the_same(tmp_path: Path):
    (tmp_path / "file").touch()
    withheld = withhold(ValueError(SECRET), "../a", tmp_path / "file")
    assert isinstance(withheld, WithheldError)
    assert str(withheld).startswith("ValueError; its text is in the log of the client's node alone")
    withhold(ValueError(SECRET), "../a b", tmp_path)
    assert [path.name for path in (tmp_path / "errors").iterdir()] == [".._a_b.log"]


# Arguments -----------------------------------------------------------------------------------------------------------


def test_a_client_gets_its_own_arguments_alone():
    text = TEXT.format(when="/nowhere") + '[[callbacks]]\npath = "tests.x:Y"\nkwargs = { token = "t0ken" }\n'
    expected = {
        "a": ("/nowhere",),
        "b": ("sutton_barto_reward", "password"),
        "c-0": ("length", "11.5"),
        "c-1": ("length", "11.5"),
        None: (),
    }
    words = {word for each in expected.values() for word in each} | {"t0ken"}
    for client, own in expected.items():
        given = withhold_arguments(text, client)
        assert {word for word in words if word in given} == set(own), client
    assert withhold_arguments("", "a") == ""


@pytest.mark.parametrize("name", ["quickstart", "contrary", "mixed-control", "dialects"])
def test_what_is_left_is_a_scenario_with_the_same_entry_for_its_client(name: str):
    scenario = Scenario.load(find_scenario(name))
    for entry in scenario.clients:
        own = Scenario.loads(withhold_arguments(scenario.dumps(), entry.names[-1]))
        assert digest_entry(own, entry.names[-1]) == digest_entry(scenario, entry.names[-1])
        assert [each.names for each in own.clients] == [each.names for each in scenario.clients]


def test_a_node_with_another_clients_arguments_refuses_to_train(tmp_path: Path):
    scenario = Scenario.loads(TEXT.format(when="").replace('wrappers = [{ path = "gymnasium', "# "))
    assert digest_entry(scenario, "b") != digest_entry(Scenario.loads(withhold_arguments(scenario.dumps(), "a")), "b")
    shared_blocks = resolve_shared_blocks(scenario)
    scenario = scenario.model_copy(update={"privacy": scenario.privacy.model_copy(update={"errors": "text"})})
    config = {"client": "b", "state": str(tmp_path)}
    run_config = {"scenario": withhold_arguments(scenario.dumps(), "a")}

    def node(message: Message) -> RecordDict | Error:
        try:
            return clients.app.app(message, Context(1, 2, config, RecordDict(), run_config)).content
        except ValueError as error:
            return Error(2, str(error))

    transport = GridTransport(InMemoryGrid({1: node}), shared_blocks, scenario)
    until_known = [transport.reachable() for _ in range(3)]
    assert until_known[-1] == ("b",)
    evaluate = Evaluate(Start("run", 0, shared_blocks.initial.numpy()), EvaluationPlan(0))
    ((_, failure),) = transport.send({"b": evaluate}, 5.0)
    assert "client b was not given the arguments of its own entry of the scenario" in str(failure)


def test_a_superlink_with_keys_gives_each_node_the_scenario_of_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keys = tmp_path / "registered.json"
    keys.write_text(json.dumps({"a": {"node": 7}, "b": {"node": 8}}))
    monkeypatch.setenv("GRPO_FED_KEYS", str(keys))

    class KnownNodes:
        def __init__(self, app: Any) -> None: ...

        def find_node(self, headers: Any) -> int | None:
            key = dict(headers)[b"key"]
            if key == b"forged":
                raise PermissionError("the node's signature is not valid")
            return int(key)

    monkeypatch.setattr(own_scenario, "SuperLinkState", KnownNodes)
    answer = GetRunResponse()
    answer.run.run_id = 3
    answer.run.override_config["scenario"].string = TEXT.format(when="/nowhere")
    answer.run.override_config["out"].string = "somewhere"

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        body = answer.SerializeToString()
        headers = [(b"content-type", b"application/protobuf"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body[:50], "more_body": True})
        await send({"type": "http.response.body", "body": body[50:]})

    def ask(key: bytes, path: str = GET_RUN) -> tuple[Any, bytes]:
        events: list[Any] = []

        async def send(event: Any) -> None:
            events.append(event)

        scope = {"type": "http", "path": path, "headers": [(b"key", key)], "app": None}
        asyncio.run(OwnScenario(flower)(scope, None, send))  # type: ignore[arg-type]
        body = b"".join(event["body"] for event in events[1:])
        assert dict(events[0]["headers"])[b"content-length"] == str(len(body)).encode()
        return GetRunResponse.FromString(body).run, body

    for key, client, others in ((b"7", "a", b"password"), (b"8", "b", b"/nowhere")):
        run, body = ask(key)
        assert others not in body
        assert run.override_config["scenario"].string == withhold_arguments(TEXT.format(when="/nowhere"), client)
        assert run.override_config[OWN_CLIENT].string == client
        assert (run.run_id, run.override_config["out"].string) == (3, "somewhere")
    for key in (b"9", b"forged"):
        assert b"/nowhere" not in (body := ask(key)[1])
        assert b"password" not in body
    assert b"password" in ask(b"7", "/v1/fleet/other")[1]  # other answers pass as they are
    keys.write_text("{")
    assert b"password" not in ask(b"8")[1]
    monkeypatch.delenv("GRPO_FED_KEYS")
    assert b"password" in ask(b"7")[1]  # nothing says which client a key is for


def test_flower_answers_a_nodes_question_for_a_run_at_the_path_that_is_rewritten():
    assert GET_RUN in {getattr(route, "path", "") for route in router.routes}


def test_clients_of_one_machine_ask_once_unless_each_has_a_scenario_of_its_own():
    asked: list[int] = []

    def connection(node: int, own: str | None) -> Any:
        def read(run: int) -> dict[str, str]:
            asked.append(node)
            return {"scenario": f"of {own or 'all'}", OWN_CLIENT: own or "*"}

        return SimpleNamespace(node=node, read_run_config=read)

    configs = RunConfigs()
    assert [configs.find_scenario(connection(node, None), 1) for node in (7, 8, 7)] == ["of all"] * 3
    assert asked == [7]
    own = [configs.find_scenario(connection(node, f"c{node}"), 2) for node in (7, 8, 7)]
    assert own == ["of c7", "of c8", "of c7"]
    assert asked == [7, 7, 8]
