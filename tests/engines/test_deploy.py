"""Keys, certificates, the gate, and processes that leave none behind. Nothing of Flower is started here."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from grpo_fed.engines.deploy import commands as deploy
from grpo_fed.engines.flower.access import LocalOnlyMiddleware
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superlink import Restarter, connect, environment

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def until(true: Any) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Keys and certificates -----------------------------------------------------------------------------------------------


def test_private_keys_are_their_owners_alone(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org"], ["ant", "bee"])
    private = {path for path in tmp_path.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}
    assert {path.relative_to(tmp_path).as_posix() for path in private} == {
        "authority/ca-key.pem",
        "server/server-key.pem",
        "clients/ant/node-key",
        "clients/bee/node-key",
    }
    assert {mode(path) for path in private} == {0o600}
    assert mode(tmp_path / "authority") == mode(tmp_path / "clients" / "ant") == 0o700


def test_the_servers_certificate_is_signed_for_its_hosts_and_for_its_own_machine(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org", "192.0.2.7"], [])
    authority = x509.load_pem_x509_certificate((tmp_path / "server" / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server" / "server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("192.0.2.7"), ip_address("127.0.0.1")]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_clients_public_key_is_that_of_its_private_key(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org"], ["ant"])
    private = serialization.load_ssh_private_key((tmp_path / "clients" / "ant" / "node-key").read_bytes(), None)
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    assert private.public_key().public_bytes(*form) == (tmp_path / "server" / "nodes" / "ant.pub").read_bytes().strip()


def test_called_again_it_adds_a_client_and_leaves_the_rest(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org"], ["ant"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    checklist = deploy.init(tmp_path, [], ["bee"])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "server" / "nodes" / "bee.pub").is_file()
    assert any("ant, bee" in line for line in checklist)
    assert any("--superlink fed.example.org:9092" in line for line in checklist)


def test_other_hosts_make_another_certificate_of_the_same_authority(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org"], ["ant"])
    authority = (tmp_path / "authority" / "ca.pem").read_bytes()
    deploy.init(tmp_path, ["new.example.org"], [])
    server = x509.load_pem_x509_certificate((tmp_path / "server" / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["new.example.org", "localhost"]
    assert (
        (tmp_path / "authority" / "ca.pem").read_bytes() == authority == (tmp_path / "server" / "ca.pem").read_bytes()
    )


@pytest.mark.parametrize("name", ["", "a b", "../ant", "a" * 65])
def test_what_cannot_be_a_client_makes_nothing(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="client"):
        deploy.init(tmp_path / "made", ["fed.example.org"], ["ant", name])
    assert not (tmp_path / "made").exists()


def test_who_forgets_the_keys_is_told_what_makes_them(tmp_path: Path):
    with pytest.raises(ValueError, match=r"ca\.pem: is missing; `grpo-fed deploy init` makes it"):
        deploy.server(tmp_path)
    with pytest.raises(ValueError, match=r"ca\.pem: is missing; `grpo-fed deploy init` makes it"):
        deploy.client("ant", "fed.example.org:9092", tmp_path)
    with pytest.raises(ValueError, match="or --insecure"):
        deploy.client("ant", "fed.example.org:9092", None)


def test_a_connection_is_added_to_those_that_flower_knows(tmp_path: Path):
    (tmp_path / "config.toml").write_text('[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "lab:1"\n')
    connect(tmp_path, "field", "127.0.0.1:9092", Path("/somewhere/ca.pem"))
    assert tomllib.loads((tmp_path / "config.toml").read_text())["superlink"] == {
        "default": "lab",
        "lab": {"address": "lab:1"},
        "field": {"address": "127.0.0.1:9092", "root-certificates": "/somewhere/ca.pem"},
    }


# The gate ------------------------------------------------------------------------------------------------------------


def answered(path: str, client: tuple[str, int] | None, server: tuple[str, int] = ("192.0.2.7", 9092)) -> int:
    """The status that a request gets; 200 where it came through."""
    said: list[dict[str, Any]] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        raise AssertionError("nobody listens")

    scope = {"type": "http", "path": path, "client": client, "server": server}
    asyncio.run(LocalOnlyMiddleware(inside)(scope, receive, send))
    return int(said[0]["status"])


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs"]
)
def test_other_machines_may_neither_start_runs_nor_let_nodes_in(path: str):
    assert answered(path, ("198.51.100.3", 5000)) == 403
    assert answered(path, ("::ffff:198.51.100.3", 5000)) == 403
    assert answered(path, None) == 403
    assert answered(path, ("127.0.0.1", 5000)) == 200
    assert answered(path, ("::1", 5000)) == 200
    assert answered(path, ("::ffff:127.0.0.1", 5000)) == 200
    assert answered(path, ("192.0.2.7", 5000)) == 200  # the server's own address


def test_nodes_come_through_from_anywhere():
    assert answered("/v1/fleet/pull-messages", ("198.51.100.3", 5000)) == 200
    assert answered("/v1/control/../fleet/x", ("198.51.100.3", 5000)) == 403


def test_flower_takes_the_gate_from_where_we_put_it():
    """The one private place that the gate touches."""
    import inspect

    from flwr.superlink import extensions
    from flwr.superlink import main as superlink

    assert superlink.extensions is extensions
    assert "*extensions.get_middleware()" in inspect.getsource(superlink._get_middleware)
    paths = {route.path for route in superlink.fleet_router.routes}
    assert paths
    assert all(path.startswith("/v1/fleet/") for path in paths)


# Processes -----------------------------------------------------------------------------------------------------------


def test_what_ended_is_known_by_its_code_and_its_words(tmp_path: Path):
    with SupervisedProcesses(tmp_path, os.environ, tmp_path) as processes:
        processes.start("one", ["sh", "-c", "echo last words; exit 3"])
        assert processes.wait("one", PATIENCE) == 3
        assert processes.tail("one") == "last words"
        processes.start("two", ["sleep", "60"])
        assert processes.ended("two") is None
        processes.send("two", signal.SIGKILL)
        assert processes.wait("two", PATIENCE) == -signal.SIGKILL
        with pytest.raises(OSError, match="no-such-command"):
            processes.start("three", ["no-such-command"])


def test_what_has_ended_is_started_again(tmp_path: Path):
    with SupervisedProcesses(tmp_path, os.environ, tmp_path) as processes:
        first = processes.start("one", ["sleep", "60"])
        upkeep = Restarter(processes, {"one": ["sleep", "60"]}, pause=0.1)
        assert upkeep.look() == []
        os.kill(first, signal.SIGKILL)
        until(lambda: upkeep.look() == ["one"])
        assert upkeep.codes == {"one": -signal.SIGKILL}
        assert processes.ended("one") is None


STUBBORN = "trap '' TERM; setsid sleep 60 & echo $! > orphan; echo $$ > stubborn; while :; do sleep 60; done"
"""A process that will not be asked to stop, with a child in a session of its own."""

LEAVES = """
import os, sys
from pathlib import Path
from grpo_fed.engines import guard
from grpo_fed.engines.flower.processes import Processes
here = Path(sys.argv[1])
processes = Processes(here, os.environ, here)
processes.start("one", ["sh", "-c", sys.argv[2]])
while not (here / "stubborn").exists():
    pass
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans on to the guard")
def test_killed_with_9_it_leaves_no_process_behind(tmp_path: Path):
    code = [sys.executable, "-c", LEAVES, str(tmp_path), STUBBORN]
    with subprocess.Popen(code, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"there\n"
        left = [int((tmp_path / name).read_text()) for name in ("stubborn", "orphan")]
        assert all(map(runs, left))
        parent.kill()
    until(lambda: not any(map(runs, left)))


def test_flowers_processes_look_for_nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    known = environment(tmp_path)
    assert known["FLWR_HOME"] == str(tmp_path)
    assert known["FLWR_TELEMETRY_ENABLED"] == "0"
    assert known["FLWR_DISABLE_UPDATE_CHECK"] == known["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert known["NO_PROXY"] == "example.org,127.0.0.1,localhost"
