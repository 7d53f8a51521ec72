"""A client that the scenario does not name joins a running deployment: real clients on a grid in this process."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

import clients.app
from grpo_fed.engines import wire
from grpo_fed.engines.flower.admission import serve_federation
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.start import run
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.federation.joining import prepare_joining
from grpo_fed.policy.shared import TASK_SHAPES
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.runs import checkpoint
from grpo_fed.runs.folder import open_unfinished, read_engine_state, read_scenario
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.newcomers import with_newcomers
from grpo_fed.scenario.own_arguments import digest_entry, withhold_arguments
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import TaskShape
from tests.support.in_memory_grid import Client, InMemoryGrid, enter_run
from tests.support.small_federation import TINY

OVERRIDES = ["rounds=4", "evaluate.every=1", "checkpoint.keep=9"]
OVERRIDES += ['merge.rule="persistence"', 'proximity.mode="measured"']
SCENARIO = Scenario.loads(TINY, overrides=[*OVERRIDES, "newcomers.like=ant"])
VETERANS = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Mapping[str, Client]]:
    """Make the nodes of three veterans, of doe and of eve, whose apps are in a module of their own."""
    spec = importlib.util.spec_from_file_location("client_app_of_newcomers", clients.app.__file__)
    assert spec is not None
    assert spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)

    def node(name: str) -> Client:
        config = {"client": name, "state": str(tmp_path / "states" / name)}
        context = Context(1, 2, config, RecordDict(), {"scenario": SCENARIO.dumps()})
        return lambda message: app.app(message, context).content

    (tmp_path / "states").mkdir()
    yield {name: node(name) for name in (*VETERANS, "doe", "eve")}
    app.node.close()


def serve(
    grid: InMemoryGrid,
    folder: Path,
    scenario: Scenario = SCENARIO,
    joins: Mapping[int, tuple[int, Client]] | None = None,
) -> tuple[Result, list[RoundRecord]]:
    """Run a federation, or go on with it if the folder has one.

    joins: by the round whose record is the latest, a node that connects then.
    """
    after, state = None, {}
    if folder.is_dir():
        scenario, after = open_unfinished(folder)
        state = {} if after is None else after.part("engine", dict)
    folder.mkdir(exist_ok=True)
    names = [name for entry in scenario.clients for name in entry.names]
    registry, records = NodeRegistry(grid, names, welcomes=scenario.newcomers.like is not None), list[RoundRecord]()

    def watch(record: RoundRecord) -> None:
        records.append(record)
        if record.round in (joins or {}):
            number, client = joins[record.round]  # type: ignore[index]
            grid.clients[number] = client

    return serve_federation(scenario, grid, registry, folder, after, state, watch), records


def veterans_of(nodes: Mapping[str, Client]) -> InMemoryGrid:
    return InMemoryGrid({number: nodes[name] for number, name in enumerate(VETERANS, 7)})


def test_a_client_that_the_scenario_does_not_name_joins_after_a_round(
    nodes: Mapping[str, Client], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    result, records = serve(veterans_of(nodes), folder, joins={1: (20, nodes["doe"])})
    printed = capsys.readouterr().out
    assert "client doe asks to join the run of scenario tiny, with the task of ant" in printed
    assert "doe joins in round 3, as a client like ant" in printed
    assert printed.count("run folder: ") == 1
    assert (result.status, result.rounds, result.missing) == ("finished", 4, {})
    assert result.clients["doe"].joined == 3
    assert result.clients["doe"].env_steps == 2 * 64
    assert result.clients["doe"].after is not None
    assert result.clients["ant"].env_steps == 4 * 64
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert ["doe" in line["clients"] for line in lines] == [False, False, True, True]
    assert [record.notes for record in records if record.notes] == [("doe joins in round 3, as a client like ant",)]
    assert records[3].notes
    assert [record.round for record in records] == [0, 1, 2, 3, 4], "each round is told once"
    assert [entry.name for entry in read_scenario(folder).clients] == [*VETERANS, "doe"]
    shared = load_file(folder / "checkpoints" / "round-0003" / "shared.safetensors")
    assert shared["evidence:0.newcomers"].tolist() == [False, False, False, True], "it is asked what fits it"
    assert len(list((tmp_path / "states" / "doe").glob("*/policies/doe.safetensors"))) == 1


def test_it_is_the_same_as_joining_a_run_that_has_ended(nodes: Mapping[str, Client], tmp_path: Path):
    """The run ends after two rounds and is joined by `grpo-fed join`, on the local engine."""
    serve(veterans_of(nodes), tmp_path / "run", joins={1: (20, nodes["doe"])})
    run(Scenario.loads(TINY, overrides=[*OVERRIDES, "rounds=2"]), tmp_path / "ended", workers=0)
    doe = '{ name = "doe", env = "grpo_fed/CartPole-v1" }'
    prepare_joining(tmp_path / "ended", [doe], ["rounds=4"], tmp_path / "joined")
    with LocalEngine.resumed(tmp_path / "joined") as engine:
        engine.run()
    arrays = [
        load_file(tmp_path / name / "checkpoints" / "round-0004" / "shared.safetensors") for name in ("run", "joined")
    ]
    for name in ("torso.0.weight", "actor.weight"):
        np.testing.assert_allclose(arrays[0][name], arrays[1][name], atol=1e-4)


def test_a_run_that_stops_as_somebody_joins_is_resumed_with_the_newcomer(
    nodes: Mapping[str, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The process is killed when the scenario names the newcomer, and no checkpoint has it yet."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    serve(veterans_of(nodes), whole, joins={1: (20, nodes["doe"])})
    grid = veterans_of(nodes)

    def killed(path: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "latest", killed)
        with pytest.raises(SystemExit):
            serve(grid, folder, joins={1: (20, nodes["doe"])})
    assert "doe" in [entry.name for entry in read_scenario(folder).clients]
    result, _ = serve(grid, folder)
    assert result.clients["doe"].joined == 3
    lines = [
        [json.loads(line)["clients"] for line in (each / "rounds.jsonl").read_text().splitlines()]
        for each in (folder, whole)
    ]
    for own, expected in zip(*lines, strict=True):
        assert {name: client["charts/episodic_return"] for name, client in own.items()} == {
            name: client["charts/episodic_return"] for name, client in expected.items()
        }


def test_no_more_join_than_may_and_who_may_not_is_told_why(nodes: Mapping[str, Client], tmp_path: Path):
    scenario = Scenario.loads(TINY, overrides=[*OVERRIDES, "newcomers={ like = 'ant', most = 1 }"])
    grid = veterans_of(nodes)
    result, _ = serve(grid, tmp_path / "run", scenario, joins={0: (20, nodes["doe"]), 1: (21, nodes["eve"])})
    assert [name for name, client in result.clients.items() if client.joined] == ["doe"]


def test_newcomers_whose_task_does_not_fit_are_refused(
    tmp_path: Path, nodes: Mapping[str, Client], monkeypatch: pytest.MonkeyPatch
):
    """The server cannot make tasks itself, and goes by what nodes say of theirs."""
    monkeypatch.setattr("grpo_fed.engines.flower.discovery.resolve_available_tasks", lambda scenario: [])
    shapes = {"wide": TaskShape(9, "categorical", (2,), 500), "dumb": None}

    def stranger(name: str) -> Client:
        return lambda message: wire.write_hello(wire.Hello(name, shapes[name]))

    grid = veterans_of(nodes)
    joins = {0: (20, stranger("wide")), 1: (21, stranger("dumb")), 2: (22, nodes["doe"])}
    result, _ = serve(grid, tmp_path / "run", joins=joins)
    assert {name: client.joined for name, client in result.clients.items() if client.joined} == {"doe": 4}
    assert {*read_engine_state(tmp_path / "run")[TASK_SHAPES]} == {*VETERANS, "doe"}


def test_why_a_client_may_not_join_is_logged(caplog: pytest.LogCaptureFixture):
    grid = InMemoryGrid({20: lambda message: wire.write_hello(wire.Hello("doe"))})
    registry = NodeRegistry(grid, ["ant"], welcomes=True)
    registry.connected_clients()
    assert registry.waiting_clients() == {"doe": None}
    registry.refuse("doe", "its task is another")
    assert registry.waiting_clients() == {}
    assert caplog.messages == ["node 20 is doe, which may not join: its task is another"]
    grid.clients[21] = grid.clients.pop(20)
    registry.connected_clients()
    assert registry.rejected[21] == "is doe, which may not join: its task is another"


def test_without_the_setting_such_a_client_takes_no_part(nodes: Mapping[str, Client], tmp_path: Path):
    closed = Scenario.loads(TINY, overrides=["rounds=2"])
    result, _ = serve(veterans_of(nodes), tmp_path / "run", closed, joins={0: (20, nodes["doe"])})
    assert {*result.clients} == {*VETERANS}


def test_the_scenario_in_words_says_who_may_join():
    words = "\n".join(sentence for part in explain_scenario(SCENARIO) for sentence in part.sentences)
    assert "up to 8 clients that the scenario does not name may join the run, each with the task of ant" in words


# The scenario ---------------------------------------------------------------------------------------------------------


def test_a_newcomer_is_like_the_entry_that_is_named():
    more = "count = 2\nspread = { length = [0.3, 0.6] }\nkwargs.gravity = 9.0"
    text = TINY.replace('name = "ant"', f'name = "ant"\n{more}')
    scenario = with_newcomers(Scenario.loads(text, overrides=["newcomers.like=ant"]), ["doe", "bee", "ant-1"])
    doe = scenario.clients[-1]
    assert len(scenario.clients) == 4
    assert (doe.names, doe.env, doe.kwargs, doe.spread) == (("doe",), "grpo_fed/CartPole-v1", {"gravity": 9.0}, {})
    assert Scenario.loads(scenario.dumps()) == scenario
    with pytest.raises(ValueError, match=r"a client cannot be called \.\./doe"):
        with_newcomers(scenario, ["../doe"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["newcomers.like=ent"], 'is the name of no entry of .*did you mean "ant"'),
        (["newcomers.like=ant", "clients.ant.trains=false"], "takes no part in training, and a newcomer does"),
        (["newcomers.like=ant", "clients.ant.attack=scaled"], "is a hostile client; name another entry"),
        (["newcomers.like=ant", "policy.shared=[]"], "nothing is shared that a newcomer could begin with"),
        (["newcomers.like=ant", "merge.rule=clusters"], "newcomers would have no cluster; leave newcomers.like out"),
        (["newcomers.like=ant", "round.mode=buffered", "merge.rule=mean"], "the order of events is of the clients"),
        (["newcomers.like=ant", "privacy.secure=true", "merge.rule=mean"], "nobody joins while the server learns sums"),
        (["newcomers.like=ant", "checkpoint.every=0"], "goes on from a checkpoint when somebody joins"),
    ],
)
def test_scenarios_that_cannot_take_newcomers_are_refused(overrides: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        Scenario.loads(TINY, overrides=overrides)


def test_a_client_that_may_join_gets_the_arguments_of_the_entry_that_it_is_like_and_no_others():
    text = Scenario.loads(TINY, overrides=["newcomers.like=bee"]).dumps()
    doe = Scenario.loads(withhold_arguments(text, "doe"))
    assert [entry.kwargs for entry in doe.clients] == [{}, {"length": 0.9}, {}]
    whole = Scenario.loads(text)
    assert digest_entry(with_newcomers(doe, ["doe"]), "doe") == digest_entry(with_newcomers(whole, ["doe"]), "doe")
    for client, expected in (("cat", {"swap_actions": True}), (None, {})):
        own = Scenario.loads(withhold_arguments(text, client))
        assert own.clients[1].kwargs == {}
        assert own.clients[2].kwargs == expected
    closed = Scenario.loads(TINY).dumps()
    assert not any(entry.kwargs for entry in Scenario.loads(withhold_arguments(closed, "doe")).clients)
