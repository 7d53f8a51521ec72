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
    WORKERS,
    fork_away,
    fork_server_of,
    make_link,
    rename_process,
)
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superexec import ServerApps
from grpo_fed.engines.flower.superlink import APP_STARTER, PROGRAM, SuperLink, is_program, make_flower_environment
from grpo_fed.engines.resident.host import make_host_command
from grpo_fed.engines.workers import fork_server
from server.app import _stop_cleanly
from tests.support.processes import find_descendants, is_running
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
    link, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    apps = ServerApps(link)
    apps.start(["--token", "one"])
    assert json.loads(end.recv(1000)) == ["--token", "one"]
    end.close()  # as if the process had died
    apps.start(["--token", "two"])
    started = tmp_path / "started"
    until(lambda: started.exists() and started.read_text() == "--token two\n")


def test_a_new_link_is_served_when_the_one_before_is_closed(monkeypatch: pytest.MonkeyPatch):
    """A node that was killed leaves an answer that nobody reads, and a worker, and the next one gets neither."""
    monkeypatch.setattr(fork_server, "_work", lambda link: link.recv(1))
    with fork_server_of("json") as forks:
        pairs = [socket.socketpair() for _ in range(3)]
        first = make_link(forks, WORKERS)
        requests = fork_server._ForkServer(first)
        killed, left = (requests.fork(theirs, 2) for _, theirs in pairs[:2])
        first.send(fork_server.REQUEST.pack(fork_server.REAP, killed))
        first.close()
        for pair in pairs[:2]:
            for end in pair:
                end.close()  # and so the worker ends
        until(lambda: not is_running(left), 60)
        with make_link(forks, WORKERS) as second:
            requests = fork_server._ForkServer(second)
            worker = requests.fork(pairs[2][1], 2)
            assert worker not in (killed, left)
            assert is_running(worker)
            assert not Path(f"/proc/{left}").exists(), "it was reaped"
            assert "SIGKILL" in requests.reap(worker)
    for end in pairs[2]:
        end.close()


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
        assert processes.wait("superlink", 300) not in (0, None)
        assert "address already in use" in processes.tail("superlink").lower()
        processes.send("superexec", signal.SIGKILL)
        assert processes.wait("superexec", 300) == -signal.SIGKILL, "a forked process is supervised like any other"


def test_a_program_that_has_ended_is_forked_again_while_there_is_a_launcher(tmp_path: Path):
    """What `ps` lists of a fork has no arguments, of a command it has."""
    command = make_host_command("127.0.0.1:1", {"ant": None}, own_keys=tmp_path / "keys")
    with SupervisedProcesses(tmp_path, make_flower_environment(tmp_path), tmp_path) as processes:
        processes.launch({"node": command[3:]})
        until(lambda: processes.pid("node") is not None)
        has_arguments = []
        for is_last in (False, True):
            if is_last:
                for launcher in find_descendants(os.getpid(), "engines.flower.launcher"):
                    os.kill(launcher, signal.SIGKILL)
            processes.send("node", signal.SIGKILL)
            assert processes.wait("node", 300) == -signal.SIGKILL
            listed = Path(f"/proc/{processes.start('node', command)}/cmdline")
            until(lambda listed=listed: b"resident.host" in listed.read_bytes())  # type: ignore[misc]
            has_arguments.append(b"--superlink" in listed.read_bytes())
        assert has_arguments == [False, True]


def test_a_servers_app_ends_before_the_superlink_is_asked_to(tmp_path: Path):
    """It tells the SuperLink of its end."""
    app = tmp_path / SERVER_APP
    app.write_text("""#!/bin/sh
trap 'sleep 0.3; ls > seen; exit' TERM
touch ready
while :; do sleep 0.05; done
""")
    app.chmod(0o755)
    superlink = "trap 'touch stopped; exit' TERM; touch waits; while :; do sleep 0.05; done"
    with SupervisedProcesses(tmp_path, dict(os.environ), tmp_path) as processes:
        processes.start("superlink", ["sh", "-c", superlink])
        processes.start("app", [str(app)])
        until(lambda: (tmp_path / "ready").exists() and (tmp_path / "waits").exists())
    assert "stopped" not in (tmp_path / "seen").read_text().split()
    assert (tmp_path / "stopped").exists()


def test_a_second_signal_does_not_interrupt_the_end_of_a_run():
    reported, written = list[int](), list[bool]()
    before = signal.signal(signal.SIGTERM, lambda number, frame: reported.append(number))

    def run() -> None:
        with _stop_cleanly():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                written.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (reported, written) == ([signal.SIGTERM], [True])
