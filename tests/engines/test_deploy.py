"""Keys, certificates, the access middleware, and processes that leave none behind; no process of Flower is started."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from grpo_fed.engines.deploy import commands as deploy
from grpo_fed.engines.flower import access
from grpo_fed.engines.flower.access import LocalOnlyMiddleware
from grpo_fed.engines.flower.connections import SuperLinkAddress, read_connection, write_connection
from grpo_fed.engines.flower.limits import CONNECTION
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superlink import Restarter, make_flower_environment
from grpo_fed.scenario.scenario import Scenario

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def until(is_true: Callable[[], bool]) -> None:
    """Wait until a condition holds that must come true."""
    end = time.monotonic() + PATIENCE
    while not is_true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Keys and certificates -----------------------------------------------------------------------------------------------


def test_private_keys_are_readable_by_their_owner_alone(tmp_path: Path):
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


def test_the_servers_certificate_is_for_its_hosts_and_localhost(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org", "192.0.2.7"], [])
    authority = x509.load_pem_x509_certificate((tmp_path / "server" / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server" / "server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("192.0.2.7"), ip_address("127.0.0.1")]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_clients_public_key_belongs_to_its_private_key(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org"], ["ant"])
    private = serialization.load_ssh_private_key((tmp_path / "clients" / "ant" / "node-key").read_bytes(), None)
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    assert private.public_key().public_bytes(*form) == (tmp_path / "server" / "nodes" / "ant.pub").read_bytes().strip()


def test_a_second_init_adds_a_client_and_leaves_the_rest(tmp_path: Path):
    deploy.init(tmp_path, ["fed.example.org"], ["ant"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    checklist = deploy.init(tmp_path, [], ["bee"])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (tmp_path / "server" / "nodes" / "bee.pub").is_file()
    assert any("ant, bee" in line for line in checklist)
    assert any("--superlink fed.example.org:9092" in line for line in checklist)


def test_other_hosts_get_a_certificate_of_the_same_authority(tmp_path: Path):
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
def test_an_invalid_client_name_writes_nothing(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="client"):
        deploy.init(tmp_path / "made", ["fed.example.org"], ["ant", name])
    assert not (tmp_path / "made").exists()


def test_a_missing_key_names_the_command_that_makes_it(tmp_path: Path):
    with pytest.raises(ValueError, match=r"ca\.pem: is missing; make it with `grpo-fed deploy init`"):
        deploy.server(tmp_path)
    with pytest.raises(ValueError, match=r"ca\.pem: is missing; make it with `grpo-fed deploy init`"):
        deploy.client(["ant"], "fed.example.org:9092", tmp_path)
    with pytest.raises(ValueError, match="or --insecure"):
        deploy.client(["ant"], "fed.example.org:9092", None)


def test_a_connection_is_added_to_flowers_configuration(tmp_path: Path):
    (tmp_path / "config.toml").write_text('[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "lab:1"\n')
    write_connection(tmp_path, "field", SuperLinkAddress("127.0.0.1:9092", Path("/somewhere/ca.pem")))
    assert tomllib.loads((tmp_path / "config.toml").read_text())["superlink"] == {
        "default": "lab",
        "lab": {"address": "lab:1"},
        "field": {"address": "127.0.0.1:9092", "root-certificates": "/somewhere/ca.pem"},
    }


def test_a_connection_that_cannot_be_used_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    config = tmp_path / "config.toml"
    config.write_text('[superlink.none]\n[superlink.bare]\naddress = "lab:1"\n[superlink.open]\naddress = "lab:2"\n')
    with config.open("a") as file:
        file.write('insecure = true\n[superlink.tls]\naddress = "lab:3"\nroot-certificates = "ca.pem"\n')
    assert read_connection("open") == SuperLinkAddress("lab:2", None)
    with pytest.raises(ValueError, match=r"superlink\.none has no address; add a line"):
        read_connection("none")
    with pytest.raises(ValueError, match=r"superlink\.bare has no root-certificates; add the path"):
        read_connection("bare")
    with pytest.raises(ValueError, match=r"ca\.pem: is missing; superlink\.tls in .*config\.toml names it"):
        read_connection("tls")
    (tmp_path / "ca.pem").touch()
    assert read_connection("tls") == SuperLinkAddress("lab:3", tmp_path / "ca.pem")
    with pytest.raises(ValueError, match="has no SuperLink lab, it has none, bare, open, tls"):
        read_connection("lab")


def test_the_documented_deployment_has_the_clients_of_its_scenario():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    init, in_containers = re.findall(r"^grpo-fed deploy init .*$", page, re.MULTILINE)
    (text,) = re.findall(r'```toml\n(name = "lab"\n.*?)```', page, re.DOTALL)
    scenario = Scenario.loads(text)
    clients = [name for settings in scenario.clients for name in settings.names]
    assert re.findall(r"--client (\w+)", init) == re.findall(r"--client (\w+)", in_containers) == clients
    assert "grpo-fed run lab.toml" in page


# Access --------------------------------------------------------------------------------------------------------------


def status_of(
    path: str,
    client: tuple[str, int] | None,
    server: tuple[str, int] = ("192.0.2.7", 9092),
    uid: int | None = os.geteuid(),
    is_private: bool = False,
) -> int:
    """Return the status that a request gets; 200 if it was passed on. uid: the account that it comes from."""
    sent: list[dict[str, Any]] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the middleware reads no request")

    extensions = {CONNECTION: SimpleNamespace(peer_uid=uid)}
    scope = {"type": "http", "path": path, "client": client, "server": server, "extensions": extensions}
    asyncio.run(LocalOnlyMiddleware(inside, is_private)(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs"]
)
def test_other_machines_may_not_start_runs_or_register_nodes(path: str):
    assert status_of(path, ("198.51.100.3", 5000)) == 403
    assert status_of(path, ("::ffff:198.51.100.3", 5000)) == 403
    assert status_of(path, None) == 403
    assert status_of(path, ("127.0.0.1", 5000)) == 200
    assert status_of(path, ("::1", 5000)) == 200
    assert status_of(path, ("::ffff:127.0.0.1", 5000)) == 200
    assert status_of(path, ("192.0.2.7", 5000)) == 200  # the server's own address


def test_nodes_have_access_from_any_machine():
    assert status_of("/v1/fleet/pull-messages", ("198.51.100.3", 5000)) == 200
    assert status_of("/v1/control/../fleet/x", ("198.51.100.3", 5000)) == 403


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say whose connection it is")
def test_other_accounts_of_the_machine_may_not_start_runs():
    here, control, fleet = ("127.0.0.1", 5000), "/v1/control/start-run", "/v1/fleet/pull-messages"
    another = os.geteuid() + 1000
    assert status_of(control, here, uid=another) == status_of(control, here, uid=None) == 403
    assert status_of(control, here, uid=0) == status_of(control, here) == 200
    assert status_of(fleet, here, uid=another) == 200, "nodes have keys"
    assert status_of(fleet, here, uid=another, is_private=True) == 403, "a SuperLink for one run has no keys"
    assert status_of(fleet, here, is_private=True) == 200


def test_the_environment_does_not_open_the_superlink(monkeypatch: pytest.MonkeyPatch):
    for name in ("FORWARDED_ALLOW_IPS", "FLWR_INTERNAL_GRPC_CONTROL_API", "SSLKEYLOGFILE"):
        monkeypatch.setenv(name, "*")
    given: dict[str, Any] = {}
    monkeypatch.setattr(access, "run_superlink", lambda arguments, middleware, **options: given.update(options))
    access.main(["--insecure", "--host", "127.0.0.1"])
    config = uvicorn.Config("app:app", **given)
    assert config.forwarded_allow_ips == ["127.0.0.1", "::1"]
    environment = make_flower_environment()
    assert environment["FORWARDED_ALLOW_IPS"] == "127.0.0.1"
    assert environment["FLWR_INTERNAL_GRPC_CONTROL_API"] == "0"
    assert "SSLKEYLOGFILE" not in environment


# Processes -----------------------------------------------------------------------------------------------------------


def test_an_ended_process_has_an_exit_code_and_a_log(tmp_path: Path):
    with SupervisedProcesses(tmp_path, os.environ, tmp_path) as processes:
        processes.start("one", ["sh", "-c", "echo last words; exit 3"])
        assert processes.wait("one", PATIENCE) == 3
        assert processes.tail("one") == "last words"
        processes.start("two", ["sleep", "60"])
        assert processes.exit_code("two") is None
        processes.send("two", signal.SIGKILL)
        assert processes.wait("two", PATIENCE) == -signal.SIGKILL
        with pytest.raises(OSError, match="no-such-command"):
            processes.start("three", ["no-such-command"])


def test_an_ended_process_is_restarted(tmp_path: Path):
    with SupervisedProcesses(tmp_path, os.environ, tmp_path) as processes:
        first = processes.start("one", ["sleep", "60"])
        restarter = Restarter(processes, {"one": ["sleep", "60"]}, pause=0.1)
        assert restarter.restart_ended() == []
        os.kill(first, signal.SIGKILL)
        until(lambda: restarter.restart_ended() == ["one"])
        assert restarter.exit_codes == {"one": -signal.SIGKILL}
        assert processes.exit_code("one") is None


STUBBORN = "trap '' TERM; setsid sleep 60 & echo $! > orphan; echo $$ > stubborn; while :; do sleep 60; done"
"""A process that ignores the request to stop, with a child in a session of its own."""

LEAVES = """
import os, sys
from pathlib import Path
from grpo_fed.engines.flower.limits import CONNECTION
from grpo_fed.engines.flower.processes import SupervisedProcesses
here = Path(sys.argv[1])
processes = SupervisedProcesses(here, os.environ, here)
processes.start("one", ["sh", "-c", sys.argv[2]])
while not (here / "stubborn").exists():
    pass
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux do orphans become children of the supervisor")
def test_no_process_survives_an_owner_that_is_killed(tmp_path: Path):
    code = [sys.executable, "-c", LEAVES, str(tmp_path), STUBBORN]
    with subprocess.Popen(code, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"there\n"
        left = [int((tmp_path / name).read_text()) for name in ("stubborn", "orphan")]
        assert all(map(is_running, left))
        parent.kill()
    until(lambda: not any(map(is_running, left)))


def test_flowers_processes_are_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "example.org")
    environment = make_flower_environment(tmp_path)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert (
        environment["FLWR_DISABLE_UPDATE_CHECK"] == environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    )
    assert environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"
