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

from grpo_fed.engines.deploy import commands as deploy
from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.flower.superlink import find_free_port
from grpo_fed.scenario.scenario import Scenario
from tests.support.processes import find_descendants
from tests.support.small_federation import ROOT, TINY, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-u", "-m", "grpo_fed", "deploy", *arguments]


def test_users_see_what_is_missing_and_ctrl_c_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bee and cat are started when the run says that it waits for them."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    port, processes = str(find_free_port()), list[subprocess.Popen[str]]()

    def start(log: str, *arguments: str) -> None:
        with (tmp_path / log).open("w") as out:
            processes.append(subprocess.Popen(command(*arguments), cwd=ROOT, stdout=out, stderr=out, text=True))

    def start_clients(log: str, *names: str) -> None:
        options = [word for name in names for word in ("--name", name)]
        options += ["--superlink", f"127.0.0.1:{port}", "--state", str(tmp_path / log)]
        start(f"{log}.log", "client", "--insecure", *options)

    def say(line: str) -> None:
        lines.append(line)
        if "waiting for" in line and len(processes) == 2:
            start_clients("late", "bee", "cat")

    lines: list[str] = []
    try:
        start("server.log", "server", str(tmp_path / "server"), "--insecure", "--port", port)
        start_clients("early", "ant", "dog")
        early = tmp_path / "early.log"
        until(lambda: "ready at" in (tmp_path / "server.log").read_text())
        until(lambda: all(f"client {name} is connected" in early.read_text() for name in ("ant", "dog")))
        scenario = Scenario.loads(TINY, overrides=["rounds=1"])
        result = FlowerEngine(scenario, tmp_path / "run", superlink="grpo-fed").run(say=say)
        second = FlowerEngine(scenario, tmp_path / "second", superlink="grpo-fed").run()
        status = deploy.status()
    finally:
        began = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGINT)
        codes = [process.wait(30) for process in processes]
        seconds = time.monotonic() - began
    assert (result.status, result.missing) == ("finished", {})
    assert any("waiting for" in line and "bee, cat; start them with `grpo-fed deploy client`" in line for line in lines)
    assert any("says that it is dog, and the scenario has no such client" in line for line in lines)
    takes_no_part = "client dog takes no part in the run of scenario tiny, which has ant, bee, cat"
    assert early.read_text().count(takes_no_part) == 2, "once for each run"
    rows = {line.split()[0]: line.split()[1] for line in status if len(line.split()) > 1}
    assert {rows[name] for name in ("ant", "bee", "cat", "dog")} == {"resident"}
    assert (second.status, second.missing) == ("finished", {})
    assert second.clients == result.clients, "a run knows nothing of the one before"
    assert sum("finished:completed" in line for line in status) == 2
    assert any(f"cpu     {version('grpo-fed')}" in line for line in status)
    assert codes == [130] * 3
    assert seconds < 30, "they wait for something"
    words = ("engines.flower", "engines/flower", "engines.resident", "flower-superexec")
    assert not [pid for word in words for pid in find_descendants(os.getpid(), word)]
