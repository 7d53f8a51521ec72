"""A deployment with real processes, TLS and keys, and what happens when some are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from grpo_fed.engines.deploy import commands as deploy
from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.flower.superlink import environment, free_port, script
from grpo_fed.engines.start import run
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from tests.support.small_federation import CLIENTS, CONNECTION, ROOT, TINY, agree, until

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

gymnasium.register("Cats-v0", entry_point="tests.support.failing_envs:WaitingCartPole", max_episode_steps=50)
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
        clients.append(one.model_copy(update={"env": "tests.support.failing_envs:Waiting-v0", "kwargs": kwargs}))
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
    expected = tmp_path / "expected", run(scenario, tmp_path / "expected", workers=0)
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
        kill_below(deployment.server.pid, "grpo_fed.engines.flower.access")
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

    def watch(note: RoundRecord) -> None:
        trained[note.round] = {one.client for one in note.clients if one.steps}

    with ThreadPoolExecutor(1) as apart:
        killed = apart.submit(kill)
        result = FlowerEngine(scenario, tmp_path / "run", superlink=CONNECTION).run(watch, said.append)
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
