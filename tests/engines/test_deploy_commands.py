"""The commands of a deployment, as processes: what a user sees of missing and superfluous clients, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.flower.superlink import find_free_port
from grpo_fed.scenario.scenario import Scenario
from tests.support.processes import find_descendants
from tests.support.small_federation import ROOT, TINY, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-u", "-m", "grpo_fed", "deploy", *arguments]


def test_users_see_what_is_missing_and_ctrl_c_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    port, here = str(find_free_port()), {"cwd": ROOT, "text": True}
    server_log, client_log = tmp_path / "server.log", tmp_path / "client.log"
    server_command = command("server", str(tmp_path / "server"), "--insecure", "--port", port)
    names = ["--name", "ant", "--name", "dog"]
    client_command = command("client", "--insecure", *names, "--superlink", f"127.0.0.1:{port}")
    with server_log.open("w") as out:
        server = subprocess.Popen(server_command, stdout=out, stderr=out, **here)  # type: ignore[call-overload]
    with client_log.open("w") as out:
        client = subprocess.Popen(
            [*client_command, "--state", str(tmp_path / "state")],
            stdout=out, stderr=out, **here,  # type: ignore[call-overload]
        )  # fmt: skip
    try:
        until(lambda: "ready at" in server_log.read_text())
        until(lambda: all(f"client {name} is connected" in client_log.read_text() for name in ("ant", "dog")))
        overrides = ["rounds=1", "round.deadline=30", "round.quorum=0.3"]
        scenario, lines = Scenario.loads(TINY, overrides=overrides), list[str]()
        result = FlowerEngine(scenario, tmp_path / "run", superlink="grpo-fed").run(say=lines.append)
        second = FlowerEngine(scenario, tmp_path / "second", superlink="grpo-fed").run()
        status = subprocess.run(command("status"), capture_output=True, check=True, **here)  # type: ignore[call-overload]
    finally:
        began = time.monotonic()
        for process in (client, server):
            process.send_signal(signal.SIGINT)
        codes = [process.wait(30) for process in (client, server)]
        seconds = time.monotonic() - began
    assert (result.status, result.missing.keys()) == ("finished", {"bee", "cat"})
    assert any("waiting for" in line and "bee, cat; start them with `grpo-fed deploy client`" in line for line in lines)
    assert any("says that it is dog, and the scenario has no such client" in line for line in lines)
    takes_no_part = "client dog takes no part in the run of scenario tiny, which has ant, bee, cat"
    assert client_log.read_text().count(takes_no_part) == 2, "once for each run"
    rows = {line.split()[0]: line.split()[1] for line in status.stdout.splitlines() if len(line.split()) > 1}
    assert (rows["ant"], rows["dog"]) == ("resident", "resident")
    assert (second.status, second.missing.keys()) == ("finished", {"bee", "cat"})
    assert second.clients["ant"] == result.clients["ant"], "a run knows nothing of the one before"
    assert status.stdout.count("finished:completed") == 2
    assert f"cpu     {version('grpo-fed')}" in status.stdout
    assert codes == [130, 130]
    assert seconds < 30, "they wait for something"
    words = ("engines.flower", "engines/flower", "engines.resident", "flower-superexec")
    assert not [pid for word in words for pid in find_descendants(os.getpid(), word)]
