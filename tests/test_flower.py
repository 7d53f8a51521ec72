"""The same federation on Flower's engines as on ours, with real processes, and what happens when some are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file

from grpo_fed import deploy
from grpo_fed.engines.apps import scenario_of
from grpo_fed.engines.flower import FlowerFailed, FlowerFederation, Listener, note_line, result_line, result_of
from grpo_fed.engines.local import federate
from grpo_fed.engines.processes import Processes
from grpo_fed.engines.superlink import STATE, SuperLink, connect, environment, free_port, script
from grpo_fed.journal import ClientResult, Result
from grpo_fed.notes import RoundNote
from grpo_fed.scenario import Scenario

ROOT = Path(__file__).parents[1]
CONNECTION = "lab"
CLIENTS = ("ant", "bee", "cat")

TINY = """
name = "tiny"
rounds = 2
steps = 64
seed = 3
device = "cpu"
policy = { hidden = [8] }
rollout = { num_envs = 2, horizon = 32 }
objective = { epochs = 2, minibatches = 2 }
proximity = { mode = "quadratic" }
evaluate = { episodes = 2 }
checkpoint = { keep = 3 }

[[clients]]
name = "ant"
env = "grpo_fed/CartPole-v1"

[[clients]]
name = "bee"
env = "grpo_fed/CartPole-v1"
kwargs = { length = 0.9 }

[[clients]]
name = "cat"
env = "grpo_fed/CartPole-v1"
kwargs = { swap_actions = true }
"""


def tiny() -> Scenario:
    return Scenario.loads(TINY)


def shared(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "checkpoints" / "round-0002" / "shared.safetensors")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The run that the others are held against."""
    folder = tmp_path_factory.mktemp("local") / "run"
    return folder, federate(tiny(), folder, workers=0)


def agree(folder: Path, result: Result, local: tuple[Path, Result]) -> None:
    """The same shared blocks after two rounds, to float tolerance; the same clients, with the same returns before."""
    expected = shared(local[0])
    found = shared(folder)
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6)
    assert result.rounds == local[1].rounds
    before = {name: client.before for name, client in result.clients.items()}
    assert before == {name: client.before for name, client in local[1].clients.items()}


# A deployment on this machine ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """`deploy server` and `deploy client`s as processes, with the folder of what they know and said."""

    folder: Path
    server: subprocess.Popen[str]
    clients: dict[str, subprocess.Popen[str]]


def called(function: str, log: Path, *arguments: str, packages: Path | None = None) -> subprocess.Popen[str]:
    """A function of `deploy`, as the command line calls it, on a machine with these packages beside ours."""
    start = "import sys; from pathlib import Path; from grpo_fed import deploy"
    code = f"{start}; sys.exit(deploy.{function}({', '.join(arguments)}))"
    path = [os.environ.get("PYTHONPATH", ""), "" if packages is None else str(packages)]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-u", "-c", code]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=known, stdout=file, stderr=file, text=True)


CATS = """
import gymnasium

gymnasium.register("Cats-v0", entry_point="tests.balky:Waiting", max_episode_steps=50)
"""
"""A package that only cat's machine has."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """TLS, node keys, a server, three clients, and eve, who has a key of her own and says that she is cat."""
    folder = tmp_path_factory.mktemp("deployment")
    deploy.init(folder, [], [*CLIENTS, "eve"])
    (folder / "packages").mkdir()
    (folder / "packages" / "cats.py").write_text(CATS)
    port, log = free_port(), folder / "server.log"
    where = f"Path({str(folder)!r})"

    def client(key: str, name: str) -> subprocess.Popen[str]:
        return called(
            *("client", folder / f"{key}.log", repr(name), f"'127.0.0.1:{port}'"),
            *(f"{where} / 'clients' / {key!r}", f"state={where} / 'state' / {key!r}"),
            packages=folder / "packages" if key == "cat" else None,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(folder / "home"))
        server = called("server", log, f"{where} / 'server'", f"port={port}", f"connection={CONNECTION!r}")
        clients = {name: client(name, name) for name in CLIENTS} | {"eve": client("eve", "cat")}
        try:
            until(lambda: "ready at" in log.read_text())
            yield Deployment(folder, server, clients)
        finally:
            for process in (server, *clients.values()):
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(30) for process in (server, *clients.values())]
        assert codes == [0] * 5, log.read_text()[-2000:]


def until(true: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def kill_below(pid: int, words: str) -> None:
    """Kill -9 the one process below `pid` whose command holds these words."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue

    def is_below(one: int) -> bool:
        while one in parents and one != pid:
            one = parents[one]
        return one == pid

    (found,) = [one for one, command in commands.items() if words in command and is_below(one)]
    os.kill(found, signal.SIGKILL)


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def waiting(scenario: Scenario, deployment: Deployment, folder: Path, rounds: dict[str, list[int]]) -> Scenario:
    """The same, but its clients wait in the first step after these rounds, until a file in `folder` lets them go."""
    clients = []
    for one in scenario.clients:
        state = deployment.folder / "state" / one.name
        kwargs = {"client": one.name, "state": str(state), "rounds": rounds[one.name], "folder": str(folder)}
        clients.append(one.model_copy(update={"env": "tests.balky:Waiting-v0", "kwargs": kwargs}))
    return scenario.model_copy(update={"clients": clients})


def all_are_online() -> bool:
    """Whether every node that Flower knows of is."""
    command = [script("flwr"), "supernode", "list", CONNECTION, "--format", "json"]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return [node["status"] for node in json.loads(found.stdout)["nodes"]] == ["online"] * 4


@linux
def test_a_deployment_outlives_its_superlink_and_a_node_that_is_killed_and_comes_back(
    deployment: Deployment, tmp_path: Path
):
    """In it only cat's machine can make cat's task, and only cat's key makes a cat."""
    scenario = Scenario.loads(TINY, overrides=["rounds=5", "checkpoint.keep=5", "round.quorum=0.6"])
    scenario = waiting(scenario, deployment, tmp_path, {"ant": [1, 3], "bee": [1], "cat": [1, 2]})
    expected = tmp_path / "expected", federate(scenario, tmp_path / "expected", workers=0)
    *others, cat = scenario.clients
    scenario = scenario.model_copy(update={"clients": [*others, cat.model_copy(update={"env": "cats:Cats-v0"})]})

    def waits(client: str, round: int) -> None:
        until((tmp_path / f"{client} waits after {round}").exists)

    def goes(client: str, round: int) -> None:
        (tmp_path / f"{client} goes after {round}").touch()

    def kill() -> None:
        """The SuperLink in the second round, a node in the third; the fourth ends when the node is back."""
        for client in CLIENTS:
            waits(client, 1)
        kill_below(deployment.server.pid, "grpo_fed.engines.gate")
        for client in CLIENTS:
            goes(client, 1)
        waits("cat", 2)
        supervisor = deployment.clients["cat"]
        supervisor.send_signal(signal.SIGSTOP)  # else cat may be back in time to be told again
        try:
            kill_below(supervisor.pid, "flower-supernode")
            goes("cat", 2)
            waits("ant", 3)
        finally:
            supervisor.send_signal(signal.SIGCONT)
        until(all_are_online)
        goes("ant", 3)

    trained: dict[int, set[str]] = {}
    said: list[str] = []

    def watch(note: RoundNote) -> None:
        trained[note.round] = {one.client for one in note.clients if one.steps}

    with ThreadPoolExecutor(1) as apart:
        killed = apart.submit(kill)
        result = FlowerFederation(scenario, tmp_path / "run", superlink=CONNECTION).run(watch, said.append)
        killed.result(1)
    assert (result.status, result.rounds) == ("finished", 5)
    agree(tmp_path / "run", result, expected)  # of two rounds: nothing was lost with the SuperLink
    assert any("says that it is cat, but its key was made for eve" in line for line in said)
    assert result.missing.keys() == {"cat"}
    (number, kind, reason), *later = result.missing["cat"]
    assert (number, kind) == (3, "died"), reason
    assert later == [(4, "unreachable", "it was not connected when the round began")]
    rest = {"ant", "bee"}
    assert trained == {0: set(), 1: {*CLIENTS}, 2: {*CLIENTS}, 3: rest, 4: rest, 5: {*CLIENTS}}


# On this machine alone -----------------------------------------------------------------------------------------------


def test_flowers_simulation_agrees_with_the_local_engine(local: tuple[Path, Result], tmp_path: Path):
    pytest.importorskip("ray", reason="Ray comes with the extra `simulation`")
    said: list[str] = []
    result = FlowerFederation(tiny(), tmp_path / "run", engine="flower-sim").run(say=said.append)
    agree(tmp_path / "run", result, local)
    assert {path.stem for path in (tmp_path / "run" / "policies").glob("*.safetensors")} == set(CLIENTS)
    assert any("run folder" in line for line in said)
    assert (tmp_path / "run" / "flower" / "superlink.log").is_file()


def test_a_run_that_fails_says_why(tmp_path: Path):
    alone = tiny().model_copy(update={"clients": tiny().clients[:1]})
    scenario = Scenario.loads(alone.dumps(), overrides=["round.deadline=0.1", "round.patience=1"])
    federation = FlowerFederation(scenario, tmp_path / "run")
    with pytest.raises(FlowerFailed, match=r"^too few answers in rounds 1 to 1"):
        federation.run()
    assert federation.result is not None
    assert federation.result.status == "failed"


def test_what_cannot_work_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.txt").write_text("not a run")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        FlowerFederation(tiny(), tmp_path)
    with pytest.raises(ValueError, match="leave out superlink lab"):
        FlowerFederation(tiny(), tmp_path / "run", engine="flower-sim", superlink="lab")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    with pytest.raises(ValueError, match="has no SuperLink lab, it has none"):
        FlowerFederation(tiny(), tmp_path / "run", superlink="lab")
    assert not (tmp_path / "run").exists()


# Flower's commands alone ---------------------------------------------------------------------------------------------


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in a folder of its own, with a node for ant; what `flwr` has to know of it."""
    known = environment(tmp_path / "home", {STATE: str(tmp_path / "state")})
    for part in ("neutral", "logs"):
        (tmp_path / part).mkdir()
    with Processes(tmp_path / "neutral", known, tmp_path / "logs") as processes:
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
    assert Scenario.load(folder / "scenario.toml") == scenario_of("")
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"
    assert not list(ROOT.glob("*.fab")), "nothing is left in the repository"


# What comes back through the log -------------------------------------------------------------------------------------


def test_a_log_that_begins_again_tells_of_each_round_once():
    told: list[int] = []
    said: list[str] = []
    listener = Listener(lambda note: told.append(note.round), said.append)
    notes = [note_line(RoundNote(number, 2, 0.5, 128 * number, ())) for number in range(3)]
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
    listener = Listener(lambda note: None, lambda line: None)
    listener.hear(iter([result_line(result), None]))
    assert listener.result is not None
    assert result_of(listener.result, Path("runs")) == result
