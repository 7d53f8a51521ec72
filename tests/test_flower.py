"""The same federation on Flower's engines as on ours, with real processes, and what happens when some are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_fed import deploy
from grpo_fed.engines.flower import FlowerFailed, FlowerFederation, Listener, note_line, result_line, result_of
from grpo_fed.engines.superlink import free_port
from grpo_fed.journal import ClientResult, Result
from grpo_fed.notes import RoundNote
from grpo_fed.scenario import Scenario

ROOT = Path(__file__).parents[1]
CONNECTION = "lab"
CLIENTS = ("ant", "bee", "cat")

TINY = """
name = "tiny"
rounds = 3
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
    from grpo_fed.engines.local import federate

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
    """`deploy server` and `deploy client`s as processes, with what they said."""

    server: subprocess.Popen[str]
    clients: dict[str, subprocess.Popen[str]]


def called(function: str, log: Path, *arguments: str) -> subprocess.Popen[str]:
    """A function of `deploy`, as the command line calls it."""
    start = "import sys; from pathlib import Path; from grpo_fed import deploy"
    code = f"{start}; sys.exit(deploy.{function}({', '.join(arguments)}))"
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, "-u", "-c", code], cwd=ROOT, stdout=file, stderr=file, text=True)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """TLS, node keys, a server and three clients."""
    folder = tmp_path_factory.mktemp("deployment")
    deploy.init(folder, [], CLIENTS)
    port, log = free_port(), folder / "server.log"
    where = f"Path({str(folder)!r})"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(folder / "home"))
        server = called("server", log, f"{where} / 'server'", f"port={port}", f"connection={CONNECTION!r}")
        clients = {
            name: called(
                *("client", folder / f"{name}.log", repr(name), f"'127.0.0.1:{port}'"),
                *(f"{where} / 'clients' / {name!r}", f"state={where} / 'state' / {name!r}"),
            )
            for name in CLIENTS
        }
        try:
            until(lambda: "ready at" in log.read_text())
            yield Deployment(server, clients)
        finally:
            for process in (server, *clients.values()):
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(30) for process in (server, *clients.values())]
        assert codes == [0, 0, 0, 0], log.read_text()[-2000:]


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
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


@linux
def test_a_deployment_agrees_with_the_local_engine_and_outlives_its_superlink_and_a_node(
    deployment: Deployment, local: tuple[Path, Result], tmp_path: Path
):
    told: list[int] = []

    def watch(note: RoundNote) -> None:
        told.append(note.round)
        if note.round == 0:  # the second round begins
            kill_below(deployment.server.pid, "grpo_fed.engines.gate")
        if note.round == 2:  # the third does
            kill_below(deployment.clients["cat"].pid, "flower-supernode")

    result = FlowerFederation(tiny(), tmp_path / "run", superlink=CONNECTION).run(watch)
    assert told == [0, 1, 2, 3]
    assert (result.status, result.rounds) == ("finished", 3)
    agree(tmp_path / "run", result, local)  # of two rounds: nothing was lost with the SuperLink
    assert set(result.missing) <= {"cat"}
    assert all(number == 3 for number, _, _ in result.missing.get("cat", ()))


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
