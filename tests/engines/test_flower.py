"""The same federation on Flower's engines as on ours, with real processes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from grpo_fed.engines.flower.app_folder import scenario_from_config
from grpo_fed.engines.flower.engine import FlowerEngine, FlowerRunError, LogListener, note_line, result_line, result_of
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superlink import STATE, SuperLink, connect, environment, free_port, script
from grpo_fed.engines.start import run
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import ClientResult, Result
from grpo_fed.scenario.scenario import Scenario
from tests.support.small_federation import CLIENTS, CONNECTION, ROOT, agree, tiny, until


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The run that the others are held against."""
    folder = tmp_path_factory.mktemp("local") / "run"
    return folder, run(tiny(), folder, workers=0)


# On this machine alone -----------------------------------------------------------------------------------------------


def test_flowers_simulation_agrees_with_the_local_engine(local: tuple[Path, Result], tmp_path: Path):
    pytest.importorskip("ray", reason="Ray comes with the extra `simulation`")
    said: list[str] = []
    result = FlowerEngine(tiny(), tmp_path / "run", engine="flower-sim").run(say=said.append)
    agree(tmp_path / "run", result, local)
    assert {path.stem for path in (tmp_path / "run" / "policies").glob("*.safetensors")} == set(CLIENTS)
    assert any("run folder" in line for line in said)
    assert (tmp_path / "run" / "flower" / "superlink.log").is_file()


def test_a_run_that_fails_says_why(tmp_path: Path):
    alone = tiny().model_copy(update={"clients": tiny().clients[:1]})
    scenario = Scenario.loads(alone.dumps(), overrides=["round.deadline=0.1", "round.patience=1"])
    federation = FlowerEngine(scenario, tmp_path / "run")
    with pytest.raises(FlowerRunError, match=r"^too few answers in rounds 1 to 1"):
        federation.run()
    assert federation.result is not None
    assert federation.result.status == "failed"


def test_what_cannot_work_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in a folder of its own, with a node for ant; what `flwr` has to know of it."""
    known = environment(tmp_path / "home", {STATE: str(tmp_path / "state")})
    for part in ("neutral", "logs"):
        (tmp_path / part).mkdir()
    with SupervisedProcesses(tmp_path / "neutral", known, tmp_path / "logs") as processes:
        link = SuperLink(processes, tmp_path, free_port())
        link.start()
        link.add_node("ant")
        connect(tmp_path / "home", CONNECTION, link.address, None)
        yield known


def flwr(known: dict[str, str], *arguments: str) -> dict[str, Any]:
    """What a command answers that is called in the repository's root."""
    command = [script("flwr"), *arguments, "--format", "json"]
    done = subprocess.run(command, env=known, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert answer["success"], done.stdout + done.stderr
    return answer


def status(known: dict[str, str], run: str) -> str:
    (found,) = flwr(known, "list", CONNECTION, "--run-id", run)["runs"]
    return str(found["status"])


def test_flwr_run_starts_the_repository_as_it_lies(superlink: dict[str, str], tmp_path: Path):
    alone = tiny().model_copy(update={"clients": tiny().clients[:1], "rounds": 1})
    (tmp_path / "run.toml").write_text(tomli_w.dumps({"scenario": alone.dumps(), "out": str(tmp_path / "run")}))
    run = flwr(superlink, "run", ".", CONNECTION, "--run-config", str(tmp_path / "run.toml"))["run-id"]
    until((tmp_path / "run" / "results.json").exists)
    until(lambda: status(superlink, run) == "finished:completed")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["status"], results["rounds"], results["missing"]) == ("finished", 1, {})
    assert results["clients"]["ant"]["env_steps"] == 64
    assert (tmp_path / "run" / "scenario.toml").read_text() == alone.dumps()

    # without a scenario it is two carts, here with neither of them
    run = flwr(superlink, "run", ".", CONNECTION)["run-id"]
    runs = tmp_path / "neutral" / "runs"
    until(lambda: any(runs.glob("two-carts-0-*/scenario.toml")))
    assert status(superlink, run) == "running"
    flwr(superlink, "stop", run, CONNECTION)
    until(lambda: any(runs.glob("two-carts-0-*/results.json")))
    (folder,) = runs.iterdir()
    assert Scenario.load(folder / "scenario.toml") == scenario_from_config("")
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"
    assert not list(ROOT.glob("*.fab")), "nothing is left in the repository"


# What comes back through the log -------------------------------------------------------------------------------------


def test_a_log_that_begins_again_tells_of_each_round_once():
    told: list[int] = []
    said: list[str] = []
    listener = LogListener(lambda note: told.append(note.round), said.append)
    notes = [note_line(RoundRecord(number, 2, 0.5, 128 * number, ())) for number in range(3)]
    listener.hear(iter(["hello", notes[0], notes[1], None]))
    listener.hear(iter(["hello", notes[0], notes[1], notes[2], None]))
    assert told == [0, 1, 2]
    assert said == ["hello", "hello"]


def test_a_result_survives_the_way_through_the_log():
    client = ClientResult("grpo_fed/CartPole-v1", 9.5, None, 12.0, 20.25, 3, 128, ("actor",))
    result = Result(
        "tiny", 3, "cpu", "finished", None, 2, 1.5, 128, {"ant": client}, Path("runs"), "grpo", 10, 20,
        {"ant": [(1, "late", "no answer")]},
    )  # fmt: skip
    listener = LogListener(lambda note: None, lambda line: None)
    listener.hear(iter([result_line(result), None]))
    assert listener.result is not None
    assert result_of(listener.result, Path("runs")) == result
