"""Keys of clients that were lost, taken out and put back, rotated and made by the clients themselves; certificates."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes
from flwr.superlink.federation import NoOpFederationManager

from grpo_fed.engines.deploy import certificates, commands
from grpo_fed.engines.deploy.keys import register_keys
from grpo_fed.engines.flower.control import ControlError
from grpo_fed.engines.resident.identity import load_key
from grpo_fed.engines.resident.problems import explain_problem


class Nodes:
    """The nodes of a SuperLink, with Flower's own state of them, in memory."""

    def __init__(self) -> None:
        objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        self.state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects).state()

    def list_keys(self) -> dict[bytes, int]:
        form = Encoding.OpenSSH, PublicFormat.OpenSSH
        nodes = [node for node in self.state.get_node_info() if node.status != "unregistered"]
        return {bytes_to_public_key(node.public_key).public_bytes(*form): node.node_id for node in nodes}

    def register(self, key: Path, client: str) -> int:
        public = load_ssh_public_key(key.read_bytes())
        try:
            return self.state.create_node("", "", public_key_to_bytes(public), 0)  # type: ignore[arg-type]
        except ValueError as error:
            raise ControlError(str(error)) from None

    def unregister(self, node: int) -> None:
        self.state.delete_node("", node)

    def accepts(self, key: Path) -> bool:
        return b" ".join(key.read_bytes().split()[:2]) in self.list_keys()


class Server:
    """A server's folder with the keys of ant and bee, and what it has said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()
        commands.init(folder, ["fed.example.org"], ["ant", "bee"])
        self.keys, self.path = folder / "server" / "nodes", folder / "registered.json"
        self.nodes = Nodes()
        self.restart()

    def restart(self) -> None:
        self.lines.clear()
        register_keys(self.nodes, self.keys, self.path, self.lines.append)

    @property
    def registered(self) -> dict[str, int]:
        return {client: int(entry["node"]) for client, entry in json.loads(self.path.read_text()).items()}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_lost_notes_of_registered_keys_are_found_again(server: Server):
    before = server.registered
    server.path.unlink()
    server.restart()
    assert server.registered == before
    assert server.lines == [f"client {name}: its key is accepted" for name in ("ant", "bee")]


def test_with_lost_notes_a_key_that_was_taken_out_is_still_refused(server: Server):
    key = server.keys / "bee.pub"
    public = key.read_bytes()
    key.unlink()
    server.path.unlink()
    server.restart()
    assert list(server.registered) == ["ant"]
    (server.folder / "bee.pub").write_bytes(public)
    assert not server.nodes.accepts(server.folder / "bee.pub")
    assert any("registered.json is lost" in line for line in server.lines)


def test_a_lost_database_gets_the_keys_again(server: Server):
    server.nodes = Nodes()
    server.restart()
    assert sorted(server.registered.values()) == sorted(server.nodes.list_keys().values())
    assert server.nodes.accepts(server.keys / "ant.pub")
    assert server.lines[0] == "client ant: the SuperLink's database does not have its key any more"


def test_a_key_that_is_put_back_is_named_and_keeps_out_nobody_else(server: Server):
    key = server.keys / "ant.pub"
    public = key.read_bytes()
    key.unlink()
    server.restart()
    assert server.lines == ["client ant: its key is no longer accepted"]
    key.write_bytes(public)
    server.restart()
    (line,) = server.lines
    assert "client ant: its key is not accepted: Public key already in use" in line
    assert "grpo-fed deploy rotate FOLDER --client ant" in line
    assert list(server.registered) == ["bee"]
    commands.rotate(server.folder, ["ant"])
    server.restart()
    assert server.nodes.accepts(key)


def test_a_rotated_key_replaces_the_old_one(server: Server):
    old = server.folder / "old.pub"
    old.write_bytes((server.keys / "ant.pub").read_bytes())
    bee = server.registered["bee"]
    lines = commands.rotate(server.folder, ["ant"])
    assert str(server.folder / "clients" / "ant") in lines[0]
    server.restart()
    assert server.nodes.accepts(server.keys / "ant.pub")
    assert not server.nodes.accepts(old)
    assert server.registered["bee"] == bee
    private = server.folder / "clients" / "ant" / "node-key"
    public = load_key(private).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert public in server.nodes.list_keys()
    assert private.stat().st_mode & 0o777 == 0o600


def test_rotate_names_what_it_cannot_do(server: Server, tmp_path: Path):
    with pytest.raises(ValueError, match=r"client cat: .* has no key of it, it has ant, bee"):
        commands.rotate(server.folder, ["cat"])
    with pytest.raises(ValueError, match="name --client NAME, or --server"):
        commands.rotate(server.folder, [])
    with pytest.raises(ValueError, match="is no folder of `grpo-fed deploy init`"):
        commands.rotate(tmp_path / "none", ["ant"])


def test_a_rotated_certificate_is_for_the_same_hosts_and_authority(server: Server):
    pem = server.folder / "server" / "server.pem"
    before = pem.read_bytes()
    commands.rotate(server.folder, [], server=True)
    assert pem.read_bytes() != before
    assert certificates.read_hosts(pem.read_bytes()) == certificates.read_hosts(before)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, pem.with_name("server-key.pem"))  # certificate and key fit


def test_a_client_enrolls_with_a_key_that_stays_with_it(server: Server, tmp_path: Path):
    lines = commands.enroll(tmp_path / "cat", "cat")
    public, private = tmp_path / "cat" / "cat.pub", tmp_path / "cat" / "node-key"
    assert (private.stat().st_mode & 0o777, private.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert str(public) in lines[0]
    (server.keys / "cat.pub").write_bytes(public.read_bytes())
    server.restart()
    assert "cat" in server.registered
    with pytest.raises(ValueError, match="node-key: exists"):
        commands.enroll(tmp_path / "cat", "cat")


def test_certificates_are_checked_against_the_clock(server: Server):
    pem, now = server.folder / "server" / "server.pem", datetime.now(UTC)
    assert certificates.check_validity(pem, now=now + timedelta(days=825 - 31)) == []
    (line,) = certificates.check_validity(pem, now=now + timedelta(days=825 - 20))
    assert "expires in 19 days" in line or "expires in 20 days" in line
    assert "grpo-fed deploy rotate FOLDER --server" in line
    with pytest.raises(ValueError, match=r"expired on .*rotate FOLDER --server"):
        certificates.check_validity(pem, now=now + timedelta(days=826))
    with pytest.raises(ValueError, match="check this machine's clock"):
        certificates.check_validity(pem, now=now - timedelta(days=1))
    with pytest.raises(ValueError, match=r"ca\.pem: expired on .*grpo-fed deploy init"):
        certificates.check_validity(pem.with_name("ca.pem"), now=now + timedelta(days=3651))


def test_a_client_is_warned_of_the_certificate_that_the_server_shows(server: Server, tmp_path: Path):
    pem, now = server.folder / "server" / "server.pem", datetime.now(UTC)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, pem.with_name("server-key.pem"))
    commands.init(tmp_path / "other", [], [])
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as executor:

        def shake_hands() -> None:
            for _ in range(3):
                link, _ = listener.accept()
                with contextlib.suppress(OSError), context.wrap_socket(link, server_side=True):
                    pass

        shaking, address = executor.submit(shake_hands), f"127.0.0.1:{listener.getsockname()[1]}"
        authority = pem.with_name("ca.pem")
        assert certificates.check_server(address, authority) == []
        (line,) = certificates.check_server(address, authority, now=now + timedelta(days=825 - 20))
        assert line.startswith(f"the certificate of the server at {address}: expires in")
        with pytest.raises(OSError, match="certificate verify failed"):
            certificates.check_server(address, tmp_path / "other" / "server" / "ca.pem")
        shaking.result(10)


def test_a_server_with_an_expired_certificate_does_not_start(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(certificates, "SERVER_DAYS", 0)
    commands.rotate(server.folder, [], server=True)
    with pytest.raises(ValueError, match=r"server\.pem: expired on"):
        commands.server(server.folder / "server")


def test_a_second_server_in_the_same_folder_is_refused(server: Server):
    data = server.folder / "server" / "kept"
    data.mkdir()
    with commands.only_one(data), pytest.raises(ValueError, match="another `grpo-fed deploy server` runs from this"):
        commands.server(server.folder / "server")


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired",
            "rotate FOLDER --server",
        ),
        ("certificate verify failed: Hostname mismatch, certificate is not valid for 'x'", "as --host"),
        ("certificate verify failed: unable to get local issuer certificate", "copy the ca.pem"),
        ("[Errno 111] Connection refused", "check host and port"),
    ],
)
def test_a_client_says_in_plain_words_why_it_cannot_connect(words: str, cause: str):
    said = explain_problem(OSError(words))
    assert cause in said
    assert words in said
