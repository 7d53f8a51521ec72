"""A federation on Flower's engines, with real processes, ends like one on the local engine."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file

from grpo_fed.engines.flower.app_folder import scenario_from_config
from grpo_fed.engines.flower.connections import write_connection
from grpo_fed.engines.flower.control import SuperLinkControl
from grpo_fed.engines.flower.engine import FlowerEngine, FlowerRunError
from grpo_fed.engines.flower.log_channel import LogChannel
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superlink import STATE, SuperLink, find_free_port, find_script, make_flower_environment
from grpo_fed.engines.replay_order import replay_order
from grpo_fed.engines.resident.host import make_host_command
from grpo_fed.engines.start import run
from grpo_fed.runs.merge_order import read_orders
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import ClientResult, Result
from grpo_fed.scenario.scenario import Scenario
from tests.support.small_federation import CLIENTS, CONNECTION, ROOT, agree, tiny, until
from tests.support.small_language import words


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The run on the local engine that the others have to agree with."""
    folder = tmp_path_factory.mktemp("local") / "run"
    return folder, run(tiny(), folder, workers=0)


@dataclass(frozen=True)
class Link:
    """A SuperLink with a resident node, which all runs share."""

    folder: Path
    environment: dict[str, str]
    """That in which `flwr` finds it."""
    control: SuperLinkControl


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    folder = tmp_path_factory.mktemp("link")
    environment = make_flower_environment(folder / "home", {STATE: str(folder / "state")})
    for part in ("neutral", "logs"):
        (folder / part).mkdir()
    with SupervisedProcesses(folder / "neutral", environment, folder / "logs") as processes:
        superlink = SuperLink(processes, folder, find_free_port())
        clients = dict.fromkeys((*CLIENTS, "up", "down"))
        superlink.commands["node"] = make_host_command(superlink.address, clients, own_keys=folder / "keys")
        superlink.start()
        write_connection(folder / "home", CONNECTION, superlink.connection)
        with SuperLinkControl(superlink.connection) as control, pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLWR_HOME", str(folder / "home"))
            yield Link(folder, environment, control)


# On this machine alone -----------------------------------------------------------------------------------------------


def test_flowers_simulation_agrees_with_the_local_engine(
    local: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("ray", reason="Ray comes with the extra `simulation`")
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one process for all clients, which has to import Ray, too
    lines: list[str] = []
    result = FlowerEngine(tiny(), tmp_path / "run", engine="flower-sim").run(say=lines.append)
    agree(tmp_path / "run", result, local)
    assert {path.stem for path in (tmp_path / "run" / "policies").glob("*.safetensors")} == set(CLIENTS)
    assert any("run folder" in line for line in lines)
    assert (tmp_path / "run" / "flower" / "superlink.log").is_file()


def test_language_models_on_a_superlink_end_like_on_the_local_engine(tmp_path: Path, link: Link):
    given = words("evaluate.episodes=2", "language.show=1", "proximity.mode=quadratic", clients=("up", "down"))
    expected = run(given, tmp_path / "local", workers=0)
    result = FlowerEngine(given, tmp_path / "run", superlink=CONNECTION).run()
    assert (result.status, result.missing) == ("finished", {})
    (kept,) = link.folder.glob("state/*/policies/up")  # the clients of a deployment keep their policies
    assert {name: client.before for name, client in result.clients.items()} == {
        name: client.before for name, client in expected.clients.items()
    }
    for client in ("up", "down"):
        found, wanted = (
            load_file(folder / client / "adapter_model.safetensors")
            for folder in (kept.parent, tmp_path / "local" / "policies")
        )
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)
        assert max(np.abs(array).max() for name, array in wanted.items() if "lora_B" in name) > 0.01


@pytest.mark.parametrize("again", ["after-merge", "at-once"])
def test_a_run_that_does_not_wait_is_repeated_to_the_same_bits(tmp_path: Path, link: Link, again: str):
    changes = ['round.mode="buffered"', "round.buffer=0.5", f'round.again="{again}"', 'wire.dtype="float16"']
    changes += ["rounds=6", "evaluate.every=3"]
    scenario = Scenario.loads(tiny().dumps(), overrides=changes)
    result = FlowerEngine(scenario, tmp_path / "run", superlink=CONNECTION).run()
    assert (result.status, len(read_orders(tmp_path / "run"))) == ("finished", 6)
    repeated = replay_order(tmp_path / "run", tmp_path / "again", replace=False, watch=lambda record: None)
    assert (repeated.merges, repeated.first_difference) == (6, None)


def test_a_server_steers_levels_on_a_superlink_as_on_the_local_engine(tmp_path: Path, link: Link):
    ranges = "ranges = { length = [0.05, 2.0] }, start = { length = [0.4, 0.6] }"
    curriculum = f"{{ kind = 'expanding', {ranges}, target = 5, episodes = 1, step = 0.4 }}"
    changes = [
        "curriculum.by=server",
        "clients.1.kwargs={}",
        *(f"clients.{number}.curriculum={curriculum}" for number in range(2)),
    ]
    scenario = Scenario.loads(
        tiny().model_copy(update={"clients": tiny().clients[:2]}).dumps(), overrides=[*changes, "rounds=3"]
    )
    folders = tmp_path / "local", tmp_path / "flower"
    run(scenario, folders[0], workers=0)
    FlowerEngine(scenario, folders[1], superlink=CONNECTION).run()
    states, shared = [], []
    for folder in folders:
        checkpoint = folder / "checkpoints" / "round-0003"
        states.append(json.loads((checkpoint / "state.json").read_text())["parts"]["server"]["curricula"])
        shared.append(load_file(checkpoint / "shared.safetensors"))
    assert states[0] == states[1]
    assert all(state[0] > 0 for state in states[0].values())
    for name, array in shared[0].items():
        np.testing.assert_allclose(array, shared[1][name], atol=2e-6)


def test_a_failed_run_raises_its_reason(tmp_path: Path, link: Link):
    alone = tiny().model_copy(update={"clients": tiny().clients[:1]})
    scenario = Scenario.loads(alone.dumps(), overrides=["round.deadline=0.001", "round.patience=1"])
    federation = FlowerEngine(scenario, tmp_path / "run", superlink=CONNECTION)
    with pytest.raises(FlowerRunError, match=r"^too few answers in rounds 1 to 1"):
        federation.run()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "failed"


def test_invalid_arguments_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.txt").write_text("not a run")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        FlowerEngine(tiny(), tmp_path)
    with pytest.raises(ValueError, match="leave out superlink lab"):
        FlowerEngine(tiny(), tmp_path / "run", engine="flower-sim", superlink="lab")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match="has no SuperLink lab, it has none"):
        FlowerEngine(tiny(), tmp_path / "run", superlink="lab")
    assert not (tmp_path / "run").exists()


# Flower's commands alone ---------------------------------------------------------------------------------------------


def test_flwr_run_takes_the_repository_as_an_app(tmp_path: Path, link: Link):
    control = link.control
    alone = tiny().model_copy(update={"clients": tiny().clients[:1], "rounds": 1})
    (tmp_path / "run.toml").write_text(tomli_w.dumps({"scenario": alone.dumps(), "out": str(tmp_path / "run")}))
    words = [
        find_script("flwr"),
        "run",
        ".",
        CONNECTION,
        "--run-config",
        str(tmp_path / "run.toml"),
        "--format",
        "json",
    ]
    done = subprocess.run(
        words, env=link.environment, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    answer = json.loads(done.stdout[done.stdout.index("{") :])
    assert answer["success"], done.stdout + done.stderr
    until(lambda: str(control.status(int(answer["run-id"]))) == "finished:completed")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["status"], results["rounds"], results["missing"]) == ("finished", 1, {})
    assert results["clients"]["ant"]["env_steps"] == 64
    assert (tmp_path / "run" / "scenario.toml").read_text() == alone.dumps()

    # Without a scenario the clients are two carts, and this SuperLink has a node for neither.
    bundle = control.prepare(ROOT)
    assert {"clients/app.py", "server/app.py"} <= {*zipfile.ZipFile(io.BytesIO(bundle)).namelist()}
    run = control.start(bundle, {}, {})
    runs = link.folder / "neutral" / "runs"
    until(lambda: any(runs.glob("two-carts-0-*/scenario.toml")))
    assert control.status(run).stage == "running"
    control.stop(run)
    until(lambda: any(runs.glob("two-carts-0-*/results.json")))
    (folder,) = runs.iterdir()
    assert Scenario.load(folder / "scenario.toml") == scenario_from_config("")
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"
    assert not list(ROOT.glob("*.fab")), "no file is left in the repository"


# The log -------------------------------------------------------------------------------------------------------------


def test_a_log_that_begins_again_reports_each_round_once():
    rounds: list[int] = []
    other_lines: list[str] = []
    channel = LogChannel(lambda record: rounds.append(record.round), other_lines.append)
    lines = [LogChannel.format_record(RoundRecord(number, 2, 0.5, 128 * number, ())) for number in range(3)]
    channel.read("\n".join(["hello", lines[0], lines[1][:40]]))
    channel.read(lines[1][40:] + "\n")
    channel.read("\n".join(["hello", *lines, ""]))
    assert rounds == [0, 1, 2]
    assert other_lines == ["hello", "hello"]


def test_a_result_survives_the_log():
    client = ClientResult("grpo_fed/CartPole-v1", 9.5, None, 12.0, 20.25, 3, 128, ("actor",))
    result = Result(
        "tiny", 3, "cpu", "finished", None, 2, 1.5, 128, {"ant": client}, Path("runs"), "grpo", 10, 20, 32,
        {"ant": [(1, "late", "no answer")]},
    )  # fmt: skip
    channel = LogChannel(lambda record: None, lambda line: None, Path("runs"))
    channel.read(LogChannel.format_result(result) + "\n")
    assert channel.result == result
