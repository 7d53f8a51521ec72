"""Processes that are forked from one that has imported what they need, and what happens if that one is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from grpo_fed.engines.flower.launcher import (
    PROGRAMS,
    SERVER_APP,
    SERVER_APP_NEEDS,
    fork_away,
    make_links,
    rename_process,
)
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superexec import ServerApps
from grpo_fed.engines.flower.superlink import APP_STARTER, PROGRAM, SuperLink, is_program, make_flower_environment
from grpo_fed.engines.resident.host import make_host_command
from tests.support.small_federation import until
from tests.test_layout import ROOT, imported_names

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries do not survive a fork elsewhere")


def test_all_that_the_servers_app_imports_is_there_before_a_run():
    imported = {name for name in imported_names(ROOT / "server" / "app.py") if name.startswith("grpo_fed.")}
    missing = {name for name in imported if not any(f"{name}.".startswith(f"{module}.") for module in SERVER_APP_NEEDS)}
    assert imported
    assert not missing


def test_every_program_of_a_federation_can_be_forked():
    commands = [PROGRAM, APP_STARTER, make_host_command("127.0.0.1:1", {"ant": None})]
    assert all(map(is_program, commands))
    assert {command[3] for command in commands} == {*PROGRAMS}
    assert not is_program(["flower-superlink", "--insecure"])


def test_a_process_that_is_forked_away_is_nobodys_to_wait_for(tmp_path: Path):
    def write() -> None:
        rename_process(["flwr-serverapp", "--token"])
        (tmp_path / "command").write_bytes(Path("/proc/self/cmdline").read_bytes())
        (tmp_path / "pid").write_text(str(os.getpid()))

    pid = fork_away(write)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() == str(pid))
    assert (tmp_path / "command").read_bytes().rstrip(b"\0").startswith(b"flwr-serverapp")
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_an_app_is_started_as_flower_does_it_where_nothing_can_be_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = tmp_path / SERVER_APP
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("subprocess.Popen.__del__", lambda self: None, raising=False)  # as Flower, it waits for none
    links, ends = make_links("apps")
    apps = ServerApps(links["apps"])
    apps.start(["--token", "one"])
    assert json.loads(ends["apps"].recv(1000)) == ["--token", "one"]
    ends["apps"].close()  # as if the process had died
    apps.start(["--token", "two"])
    started = tmp_path / "started"
    until(lambda: started.exists() and started.read_text() == "--token two\n")


def test_programs_of_a_launcher_that_dies_count_as_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Then they are restarted, each as its own command."""
    monkeypatch.setattr("grpo_fed.engines.flower.processes.LAUNCHER", "no_such_module")
    with SupervisedProcesses(tmp_path, make_flower_environment(tmp_path), tmp_path) as processes:
        processes.launch({"superlink": ["grpo_fed.engines.flower.access"], "node": ["grpo_fed.engines.resident.host"]})
        assert [processes.wait(name, 60) for name in ("superlink", "node")] == [1, 1]
        assert "no_such_module" in processes.tail("launcher")


def test_a_superlink_whose_port_is_taken_says_so(tmp_path: Path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        SupervisedProcesses(tmp_path, make_flower_environment(tmp_path), tmp_path) as processes,
    ):
        link = SuperLink(processes, tmp_path, taken.getsockname()[1])
        link.begin()
        assert processes.wait("superlink", 60) not in (0, None)
        assert "address already in use" in processes.tail("superlink").lower()
        processes.send("superexec", signal.SIGKILL)
        assert processes.wait("superexec", 60) == -signal.SIGKILL, "a forked process is supervised like any other"
