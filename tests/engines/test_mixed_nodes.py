"""Resident nodes and Flower's own, with keys over TLS, on our SuperLink and on Flower's: all serve one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_fed.engines.deploy import commands as deploy
from grpo_fed.engines.deploy.status import describe_deployment
from grpo_fed.engines.flower import superlink as superlink_module
from grpo_fed.engines.flower.connections import write_connection
from grpo_fed.engines.flower.control import SuperLinkControl
from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superlink import Identity, SuperLink, find_free_port, find_script, make_flower_environment
from grpo_fed.engines.resident.host import make_host_command
from grpo_fed.engines.start import run
from tests.support.small_federation import CLIENTS, CONNECTION, agree, stock_node_command, tiny, until


@pytest.mark.parametrize("has_exchange", [True, False], ids=["ours", "flowers"])
def test_nodes_of_both_kinds_serve_a_run(has_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ant and bee are served by one process; dog's key is not registered.

    On our SuperLink cat is served by one of Flower's own nodes, which starts a process for each message.
    """
    if not has_exchange:
        monkeypatch.setattr(superlink_module, "PROGRAM", [find_script("flower-superlink")])
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    deploy.init(tmp_path, [], [*CLIENTS, "dog"])
    for part in ("neutral", "logs", "data"):
        (tmp_path / part).mkdir()
    server, clients = tmp_path / "server", tmp_path / "clients"
    authority = server / "ca.pem"
    environment = make_flower_environment(tmp_path / "home")
    scenario = tiny().model_copy(update={"rounds": 1})
    expected = tmp_path / "expected", run(scenario, tmp_path / "expected", workers=0)
    residents = ("ant", "bee") if has_exchange else CLIENTS
    with SupervisedProcesses(tmp_path / "neutral", environment, tmp_path / "logs") as processes:
        identity = Identity(authority, server / "server.pem", server / "server-key.pem")
        link = SuperLink(processes, tmp_path / "data", find_free_port(), identity=identity)
        link.start()
        write_connection(tmp_path / "home", CONNECTION, link.connection)
        with SuperLinkControl(link.connection) as control:
            registered = {
                str(control.register(server / "nodes" / f"{client}.pub", client)): client for client in CLIENTS
            }
        keys = {client: clients / client / "node-key" for client in (*residents, "dog")}
        state = tmp_path / "state"
        processes.start("node", make_host_command(link.address, keys, authority, state / "node-keys", state))
        if has_exchange:
            key = clients / "cat" / "node-key"
            processes.start("cat", stock_node_command("cat", link.address, authority, key))
        log = processes.log("node")
        until(lambda: all(f"client {client} is connected" in log.read_text() for client in residents))
        result = FlowerEngine(scenario, tmp_path / "run", superlink=CONNECTION).run()
        lines = describe_deployment(CONNECTION, registered)
        text = log.read_text()
        code = processes.exit_code("node")
    assert (result.status, result.missing) == ("finished", {})
    agree(tmp_path / "run", result, expected, round=1)
    refusal = "does not accept it" if has_exchange else "not accepted yet"  # Flower does not say why it refuses a node
    assert any("client dog" in line and refusal in line for line in text.splitlines())
    assert ("by Flower's Fleet API" in text) is not has_exchange
    assert code is None, "a refused key ends nothing"
    rows = {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in CLIENTS}
    assert rows.keys() == {*CLIENTS}
    for client in CLIENTS:
        assert rows[client].split()[1] == ("resident" if has_exchange and client in residents else "online")
    assert any("finished:completed" in line for line in lines)


def test_a_superlink_that_another_authority_signed_for_is_said_to_be_one(tmp_path: Path):
    for name in ("mine", "theirs"):
        deploy.init(tmp_path / name, [], ["ant"])
        (tmp_path / name / "data").mkdir()
    server = tmp_path / "theirs" / "server"
    with SupervisedProcesses(tmp_path, make_flower_environment(tmp_path / "home"), tmp_path) as processes:
        identity = Identity(server / "ca.pem", server / "server.pem", server / "server-key.pem")
        link = SuperLink(processes, tmp_path / "theirs" / "data", find_free_port(), identity=identity)
        link.start()
        client = tmp_path / "mine" / "clients" / "ant"
        processes.start("node", make_host_command(link.address, {"ant": client / "node-key"}, client / "ca.pem"))
        until(lambda: "CERTIFICATE_VERIFY_FAILED" in processes.log("node").read_text())
    assert processes.log("node").stat().st_size < 1000, "and it is not said with every try"
