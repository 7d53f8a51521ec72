"""A deployment with real processes, TLS and keys, and what happens when some are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.network import Proxy
from grpo_fed.engines.deploy import commands as deploy
from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.flower.superlink import find_free_port
from grpo_fed.engines.start import run
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from tests.support.processes import is_running, kill_descendant
from tests.support.small_federation import CLIENTS, CONNECTION, ROOT, TINY, agree, until

# A deployment on this machine ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployment:
    """`deploy server` and `deploy client`s as processes, with the folder of their files and logs."""

    folder: Path
    server: subprocess.Popen[str]
    clients: dict[str, subprocess.Popen[str]]
    network: Proxy
    """Between bee and the server."""


def start(function: str, log: Path, *arguments: str, packages: Path | None = None) -> subprocess.Popen[str]:
    """Start a function of `deploy`, as the command line does, on a machine that has these packages, too."""
    imports = "import sys; from pathlib import Path; from grpo_fed.engines.deploy import commands as deploy"
    code = f"{imports}; sys.exit(deploy.{function}({', '.join(arguments)}))"
    path = [os.environ.get("PYTHONPATH", ""), "" if packages is None else str(packages)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-u", "-c", code]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, text=True)


CATS = """
import gymnasium

gymnasium.register("Cats-v0", entry_point="tests.support.failing_envs:WaitingCartPole", max_episode_steps=50)
"""
"""A package that only cat's machine has."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Run a server with TLS and node keys, three clients, and eve, a client with its own key that says it is cat."""
    folder = tmp_path_factory.mktemp("deployment")
    deploy.init(folder, [], [*CLIENTS, "eve"])
    (folder / "packages").mkdir()
    (folder / "packages" / "cats.py").write_text(CATS)
    port, log = find_free_port(), folder / "server.log"
    where = f"Path({str(folder)!r})"

    def client(key: str, name: str) -> subprocess.Popen[str]:
        address = f"'127.0.0.1:{network.port if key == 'bee' else port}'"
        return start(
            *("client", folder / f"{key}.log", repr([name]), address),
            *(f"{where} / 'clients' / {key!r}", f"state={where} / 'state' / {key!r}"),
            packages=folder / "packages" if key == "cat" else None,
        )

    with pytest.MonkeyPatch.context() as patch, Proxy(port) as network:
        patch.setenv("FLWR_HOME", str(folder / "home"))
        server = start("server", log, f"{where} / 'server'", f"port={port}", f"connection={CONNECTION!r}")
        clients = {name: client(name, name) for name in CLIENTS} | {"eve": client("eve", "cat")}
        try:
            until(lambda: "ready at" in log.read_text())
            yield Deployment(folder, server, clients, network)
        finally:
            for process in (server, *clients.values()):
                process.send_signal(signal.SIGTERM)
            codes = [process.wait(30) for process in (server, *clients.values())]
        assert codes == [0] * 5, log.read_text()[-2000:]


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def waiting(scenario: Scenario, deployment: Deployment, folder: Path, rounds: dict[str, list[int]]) -> Scenario:
    """Let the scenario's clients wait in the first step after these rounds, until a file in `folder` frees them."""
    clients = []
    for settings in scenario.clients:
        name = settings.name
        state = deployment.folder / "state" / name
        kwargs = {"client": name, "state": str(state), "rounds": rounds[name], "folder": str(folder)}
        clients.append(settings.model_copy(update={"env": "tests.support.failing_envs:Waiting-v0", "kwargs": kwargs}))
    return scenario.model_copy(update={"clients": clients})


def count_connections(deployment: Deployment, client: str) -> int:
    """Count how often a client has connected to the server."""
    return (deployment.folder / f"{client}.log").read_text().count(f"client {client} is connected")


@linux
def test_a_deployment_survives_a_cut_network_a_killed_superlink_and_a_killed_node(
    deployment: Deployment, tmp_path: Path
):
    """Only cat's machine can make cat's task, and only a node with cat's key is accepted as cat."""
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
        """Cut bee off while it answers, kill the SuperLink, and a node in the next round.

        The SuperLink is killed in the second round, the node in the third, and the fourth ends when the node is back.
        """
        for client in CLIENTS:
            waits(client, 1)
        deployment.network.cut()
        before = count_connections(deployment, "bee")
        goes("bee", 1)
        until(lambda: "trying again" in (deployment.folder / "bee.log").read_text())
        deployment.network.heal()
        until(lambda: count_connections(deployment, "bee") > before)
        kill_descendant(deployment.server.pid, "grpo_fed.engines.flower.access")
        for client in CLIENTS:
            goes(client, 1)
        waits("cat", 2)
        before = count_connections(deployment, "cat")
        supervisor = deployment.clients["cat"]
        supervisor.send_signal(signal.SIGSTOP)  # otherwise cat may be back in time to get its message again
        try:
            kill_descendant(supervisor.pid, "engines.resident.host")
            goes("cat", 2)
            waits("ant", 3)
        finally:
            supervisor.send_signal(signal.SIGCONT)
        until(lambda: count_connections(deployment, "cat") > before)
        goes("ant", 3)

    trained: dict[int, set[str]] = {}
    lines: list[str] = []

    def watch(record: RoundRecord) -> None:
        trained[record.round] = {client.client for client in record.clients if client.steps}

    with ThreadPoolExecutor(1) as executor:
        killed = executor.submit(kill)
        result = FlowerEngine(scenario, tmp_path / "run", superlink=CONNECTION).run(watch, lines.append)
        killed.result(1)
    assert (result.status, result.rounds) == ("finished", 5)
    agree(tmp_path / "run", result, expected)  # after two rounds: nothing was lost with the SuperLink
    assert any("says that it is cat, but its key was made for eve" in line for line in lines)
    assert result.missing.keys() == {"cat"}
    (number, kind, reason), *later = result.missing["cat"]
    assert (number, kind) == (3, "died"), reason
    assert later == [(4, "unreachable", "it was not connected when the round began")]
    rest = {"ant", "bee"}
    assert trained == {0: set(), 1: {*CLIENTS}, 2: {*CLIENTS}, 3: rest, 4: rest, 5: {*CLIENTS}}


@linux
def test_a_client_that_hangs_gives_way_to_its_next_message(deployment: Deployment, tmp_path: Path):
    """Bee hangs in the second round, for which the run waits until the deadline, and is well in the third."""
    scenario = Scenario.loads(TINY, overrides=["rounds=3", "round.deadline=20", "round.quorum=0.3"])
    state = {"state": str(deployment.folder / "state" / "bee"), "folder": str(tmp_path)}
    kwargs = {"client": "bee", "rounds": [1], "once": True, **state}
    ant, bee, cat = scenario.clients
    bee = bee.model_copy(update={"env": "tests.support.failing_envs:Waiting-v0", "kwargs": kwargs})
    scenario = scenario.model_copy(update={"clients": [ant, bee, cat]})
    trained: dict[int, set[str]] = {}

    def watch(record: RoundRecord) -> None:
        trained[record.round] = {client.client for client in record.clients if client.steps}

    result = FlowerEngine(scenario, tmp_path / "run", superlink=CONNECTION).run(watch)
    assert (result.status, result.rounds) == ("finished", 3)
    assert [(number, kind) for number, kind, _ in result.missing["bee"]] == [(2, "late")]
    assert "bee" in trained[1]
    assert "bee" in trained[3]
    (hung,) = map(int, (tmp_path / "bee waits after 1").read_text().split())
    assert not is_running(hung), "its process is ended with the next message"
