"""What `grpo-fed deploy` does: keys and certificates, the server, a client."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pydantic import TypeAdapter, ValidationError

from grpo_fed.engines.deploy import certificates
from grpo_fed.engines.deploy.keys import make_own_key, register_keys, replace_key
from grpo_fed.engines.deploy.status import describe_deployment, read_registered
from grpo_fed.engines.flower.connections import find_flower_home, write_connection
from grpo_fed.engines.flower.control import SuperLinkControl
from grpo_fed.engines.flower.processes import POLL, SupervisedProcesses
from grpo_fed.engines.flower.superlink import (
    KEYS,
    Identity,
    Restarter,
    SuperLink,
    find_state_folder,
    make_flower_environment,
    write_secret,
)
from grpo_fed.engines.resident.host import OWN_KEYS, make_host_command
from grpo_fed.runs.files import make_private_folder, write_atomic
from grpo_fed.scenario.field_types import Device, Name

PORT = 9092
CONNECTION = "grpo-fed"
"""The name under which `grpo-fed run --superlink` finds a server on its own machine."""
AUTHORITY, SERVER, CLIENTS = "authority", "server", "clients"
"""Folders of a deployment: the authority's certificate and key; what the server needs; what each client needs."""
NODES, DATA = "nodes", "kept"
"""Folders in the server's folder: the clients' public keys; the SuperLink's data."""
CA, CA_KEY, CERTIFICATE, KEY, NODE_KEY = "ca.pem", "ca-key.pem", "server.pem", "server-key.pem", "node-key"
REGISTERED, LOCK = "registered.json", "lock"
NODE = "node"
"""The name of the process that serves the clients of a machine."""
LOCAL_HOSTS = ("localhost", "127.0.0.1")
INTERRUPTED = 130
"""The exit code after Ctrl-C."""

Say = Callable[[str], None]


def init(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[str]:
    """Make keys and certificates, and return a checklist, line by line: what to copy where and what to start.

    If it is called again, it adds clients and leaves the others as they are; with other hosts the server gets a new
    certificate. ValueError for a name that no client can have, before anything is made.
    """
    _check_names(clients)
    authority, server = folder / AUTHORITY, folder / SERVER
    folder.mkdir(parents=True, exist_ok=True)
    for path in (authority, server, server / NODES, folder / CLIENTS):
        make_private_folder(path)
    if not (authority / CA).exists():
        certificate, key = certificates.make_authority()
        write_secret(authority / CA_KEY, key)
        write_atomic(authority / CA, certificate)
    _certify_server(authority, server, hosts)
    for client in clients:
        _add_client(authority, server, folder / CLIENTS / client, client)
    all_clients = sorted(path.name for path in (folder / CLIENTS).iterdir())
    return _checklist(folder, certificates.read_hosts((server / CERTIFICATE).read_bytes()), all_clients)


def rotate(folder: Path, clients: Sequence[str], server: bool = False) -> list[str]:
    """Make clients other keys, or the server another certificate and key; return what to copy where, line by line.

    folder: what `init` made. ValueError for a client that it has not, before anything is made.
    """
    has = folder / AUTHORITY / CA_KEY, folder / SERVER / NODES
    if not has[0].is_file() or not has[1].is_dir():
        raise ValueError(
            f"{folder}: is no folder of `grpo-fed deploy init`: {AUTHORITY}/ or {SERVER}/ is missing in it"
        )
    known = sorted(path.stem for path in has[1].glob("*.pub"))
    for client in clients:
        if client not in known:
            raise ValueError(f"client {client}: {folder / SERVER / NODES} has no key of it, it has {', '.join(known)}")
    if not clients and not server:
        raise ValueError("rotate makes nothing: name --client NAME, or --server")
    lines = []
    for client in clients:
        replace_key(folder / CLIENTS / client, client, NODE_KEY, folder / SERVER / NODES)
        write_atomic(folder / CLIENTS / client / CA, (folder / AUTHORITY / CA).read_bytes())
        lines += [
            f"client {client}: copy {folder / CLIENTS / client}/ to its machine and restart the client there;",
            (
                f"  copy {folder / SERVER / NODES}/{client}.pub to the server's {NODES}/ and restart the server,"
                " which then refuses the old key"
            ),
        ]
    if server:
        certificate = folder / SERVER / CERTIFICATE
        hosts = certificates.read_hosts(certificate.read_bytes()) if certificate.is_file() else ()
        certificate.unlink(missing_ok=True)
        _certify_server(folder / AUTHORITY, folder / SERVER, hosts)
        lines += [
            (
                f"server: copy {certificate} and {folder / SERVER / KEY} to the server and restart it; the clients keep"
                " their files"
            ),
        ]
    return lines


def enroll(folder: Path, name: str) -> list[str]:
    """Make a client's key on its own machine, and return what to do with its public half, line by line."""
    _check_names([name])
    public = make_own_key(folder, name, NODE_KEY)
    return [
        f"1. Send {public} to whoever runs the server; the private key stays in {folder / NODE_KEY}.",
        f"2. On the server: copy it to {SERVER}/{NODES}/{name}.pub, and restart the server.",
        f"3. Get the server's {CA} and put it at {folder / CA}.",
        f"4. Start the client: grpo-fed deploy client {folder} --name {name} --superlink HOST:{PORT}",
    ]


def _check_names(clients: Sequence[str]) -> None:
    for client in clients:
        try:
            TypeAdapter(Name).validate_python(client)
        except ValidationError as error:
            raise ValueError(f"client {client}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _certify_server(authority: Path, server: Path, hosts: Sequence[str]) -> None:
    """Make the server's certificate, unless it has one for the same hosts, or one at all if no hosts are named."""
    wanted = tuple(dict.fromkeys((*hosts, *LOCAL_HOSTS)))
    path = server / CERTIFICATE
    if path.exists() and (not hosts or certificates.read_hosts(path.read_bytes()) == wanted):
        return
    certificate, key = certificates.make_server_certificate(
        (authority / CA).read_bytes(), (authority / CA_KEY).read_bytes(), wanted
    )
    (server / KEY).unlink(missing_ok=True)
    write_secret(server / KEY, key)
    write_atomic(path, certificate)
    write_atomic(server / CA, (authority / CA).read_bytes())


def _add_client(authority: Path, server: Path, folder: Path, client: str) -> None:
    """Make a client's folder, with a key unless it has one."""
    make_private_folder(folder)
    write_atomic(folder / CA, (authority / CA).read_bytes())
    if not (folder / NODE_KEY).exists():
        private, public = certificates.make_node_key()
        write_secret(folder / NODE_KEY, private)
        write_atomic(server / NODES / f"{client}.pub", public)


def _checklist(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[str]:
    address = f"{hosts[0]}:{PORT}"
    first = clients[0] if clients else "NAME"
    copies = [
        f"4. Copy each client's folder to its machine, and to no other: {folder / CLIENTS}/NAME/, for NAME in",
        f"     {', '.join(clients)}",
    ]
    return [
        f"1. Keep {folder / AUTHORITY}/ offline: with it, anyone can pose as the server.",
        f"2. Copy {folder / SERVER}/ to the server ({', '.join(hosts)}) and start it there:",
        f"     grpo-fed deploy server {SERVER}",
        f"3. Open TCP port {PORT} on the server, for the clients' addresses alone. Clients need no open port.",
        *(copies if clients else [f"4. Make keys for clients: grpo-fed deploy init {folder} --client NAME"]),
        "5. Start each client on its machine, one for each GPU:",
        f"     grpo-fed deploy client {first} --name {first} --superlink {address}",
        "6. On the server, run a scenario whose clients have these names:",
        f"     grpo-fed run SCENARIO --engine flower --superlink {CONNECTION}",
    ]


# The server ----------------------------------------------------------------------------------------------------------


def server(
    folder: Path | None,
    *,
    host: str = "0.0.0.0",
    port: int = PORT,
    connection: str = CONNECTION,
    insecure: bool = False,
    open_to_all: bool = False,
    say: Say = print,
) -> int:
    """Run the server until a signal stops it, and return the exit code.

    folder: what `init` made for the server; may be None with `insecure`.
    connection: the name under which Flower's configuration on this machine gets the server.
    insecure: no encryption and no keys.
    open_to_all: other machines may use `flwr`, too; anyone who reaches the port can then run code on all machines.
    say: is called with a line at every event.
    """
    if insecure and folder is None:
        folder = Path("grpo-fed-server")
    if folder is None:
        raise ValueError("deploy server needs the folder that `grpo-fed deploy init` made for it, or --insecure")
    folder = folder.absolute()
    identity = None if insecure else _identity(folder)
    if identity is not None:
        for line in certificates.check_validity(identity.certificate, identity.authority):
            say(line)
    data = folder / DATA
    make_private_folder(data)
    environment = make_flower_environment(more={} if identity is None else {KEYS: str(data / REGISTERED)})
    with only_one(data), _stop_signals() as signals, SupervisedProcesses(data, environment) as processes:
        superlink = SuperLink(processes, data, port, host=host, identity=identity, open_to_all=open_to_all)
        superlink.start()
        write_connection(find_flower_home(), connection, superlink.connection)
        if identity is not None:
            with SuperLinkControl(superlink.connection) as control:
                register_keys(control, folder / NODES, data / REGISTERED, say)
        say(f"ready at {host}:{port}; on this machine: grpo-fed run SCENARIO --engine flower --superlink {connection}")
        return _supervise(Restarter(processes, superlink.commands), signals, say)


@contextmanager
def only_one(data: Path) -> Iterator[None]:
    """Hold a lock on the data, which the system releases however the process ends; ValueError if it is held."""
    handle = os.open(data / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{data.parent}: another `grpo-fed deploy server` runs from this folder; stop it, or give this one a"
                " folder of its own"
            ) from None
        yield
    finally:
        os.close(handle)


def _identity(folder: Path) -> Identity:
    """Return the certificates in the server's folder; ValueError if one is missing."""
    for name in (CA, CERTIFICATE, KEY):
        _check_file(folder / name)
    return Identity(folder / CA, folder / CERTIFICATE, folder / KEY)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; make it with `grpo-fed deploy init`, or use --insecure")


def status(connection: str = CONNECTION, folder: Path | None = None) -> list[str]:
    """Return what is connected to the server and what runs on it, line by line.

    folder: what `init` made for the server, which says for which client a node's key was made; may be None.
    """
    return describe_deployment(connection, read_registered((folder or Path()) / DATA / REGISTERED))


# A client ------------------------------------------------------------------------------------------------------------


def client(
    names: Sequence[str],
    superlink: str,
    folder: Path | None,
    *,
    state: Path | None = None,
    devices: Sequence[str] = (),
    insecure: bool = False,
    say: Say = print,
) -> int:
    """Run the clients of this machine until a signal stops them, and return the exit code.

    superlink: HOST:PORT of the server.
    folder: what `init` made for the client, or a folder with that of each client; may be None with `insecure`.
    state: where the clients keep their states between rounds, by default a folder of the user's.
    devices: the torch device of each client, in the order of the names, or one for all; by default the scenario's.
    insecure: no encryption and no keys.
    say: is called with a line at every event.
    """
    _check_names(names)
    given = _match_devices(names, devices)
    authority, keys = None, dict[str, Path | None].fromkeys(names)
    if not insecure:
        if folder is None:
            raise ValueError("deploy client needs the folder that `grpo-fed deploy init` made for it, or --insecure")
        folders = _find_client_folders(folder.absolute(), names)
        authority, keys = folders[names[0]] / CA, {name: folders[name] / NODE_KEY for name in names}
        for path in (authority, *(folder / NODE_KEY for folder in folders.values())):
            _check_file(path)
        for line in certificates.check_validity(authority):
            say(line)
    state = find_state_folder(state)
    if not state.is_dir():
        make_private_folder(state)
    with _stop_signals() as signals, SupervisedProcesses(Path.home(), make_flower_environment()) as processes:
        command = make_host_command(superlink, keys, authority, state / OWN_KEYS, state, given)
        processes.start(NODE, command)
        say(f"{', '.join(names)}: served to {superlink}")
        return _supervise(Restarter(processes, {NODE: command}), signals, say)


def _match_devices(names: Sequence[str], devices: Sequence[str]) -> dict[str, str]:
    """Return each client's device; ValueError for one that torch has no name for, or for another number of them."""
    for device in devices:
        try:
            TypeAdapter(Device).validate_python(device)
        except ValidationError as error:
            raise ValueError(f"--device {device}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if len(devices) not in (0, 1, len(names)):
        raise ValueError(
            f"--device is given {len(devices)} times for {len(names)} clients: give one for each --name, in the same"
            " order, or one for all"
        )
    return {name: devices[min(place, len(devices) - 1)] for place, name in enumerate(names)} if devices else {}


def _find_client_folders(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return each client's folder: this one if there is one client, or those of their names in it."""
    if len(names) == 1 and not (folder / names[0]).is_dir():
        return {names[0]: folder}
    return {name: folder / name for name in names}


# Both ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Catch the signals that ask this process to stop, in a list."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(restarter: Restarter, signals: Sequence[int], say: Say) -> int:
    """Restart processes that end, until a signal was caught; return 0 after SIGTERM and 130 after Ctrl-C."""
    while not signals:
        for name in restarter.restart_ended():
            say(f"{name} had ended, with {restarter.exit_codes[name]}, and was restarted")
        time.sleep(POLL)
    return INTERRUPTED if signals[0] == signal.SIGINT else 0
