"""Deployment by hand: keys and certificates, the server, a client. All thin over Flower's own commands."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from pydantic import TypeAdapter, ValidationError

from grpo_fed.engines.deploy import certificates
from grpo_fed.engines.flower import warm as hearth
from grpo_fed.engines.flower.processes import POLL, SupervisedProcesses
from grpo_fed.engines.flower.superlink import (
    KEYS,
    STATE,
    Flower,
    Identity,
    Restarter,
    SuperLink,
    connect,
    environment,
    flower_home,
    node_command,
    node_name,
    write_secret,
)
from grpo_fed.runs.files import write_atomic
from grpo_fed.scenario.field_types import Name

PORT = 9092
CONNECTION = "grpo-fed"
"""The name under which `grpo-fed run --superlink` finds a server on its own machine."""
AUTHORITY, SERVER, CLIENTS, NODES, KEPT = "authority", "server", "clients", "nodes", "kept"
"""Folders of a deployment: what signs; what goes to the server; what goes to each client; on the server, the clients'
public keys, and what it keeps of its own."""
CA, CA_KEY, CERTIFICATE, KEY, NODE_KEY = "ca.pem", "ca-key.pem", "server.pem", "server-key.pem", "node-key"
REGISTERED = "registered.json"
HERE = ("localhost", "127.0.0.1")
INTERRUPTED = 130

Say = Callable[[str], None]


def init(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[str]:
    """Make keys and certificates; the lines of a checklist: what to copy where and what to start.

    Called again, it adds clients and leaves what is there as it is; with other hosts the server gets a new certificate.
    ValueError for a name that cannot be a client's, before anything is made.
    """
    _refuse_bad_names(clients)
    authority, server = folder / AUTHORITY, folder / SERVER
    for made in (authority, server / NODES, folder / CLIENTS):
        made.mkdir(parents=True, exist_ok=True)
    authority.chmod(0o700)
    if not (authority / CA).exists():
        certificate, key = certificates.new_authority()
        write_secret(authority / CA_KEY, key)
        write_atomic(authority / CA, certificate)
    _certify(authority, server, hosts)
    for client in clients:
        _add_client(authority, server, folder / CLIENTS / client, client)
    everyone = sorted(path.name for path in (folder / CLIENTS).iterdir())
    return _checklist(folder, certificates.hosts_of((server / CERTIFICATE).read_bytes()), everyone)


def _refuse_bad_names(clients: Sequence[str]) -> None:
    for client in clients:
        try:
            TypeAdapter(Name).validate_python(client)
        except ValidationError as error:
            raise ValueError(f"client {client}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _certify(authority: Path, server: Path, hosts: Sequence[str]) -> None:
    """A certificate for the server, unless it has one for just these hosts or none are named."""
    wanted = tuple(dict.fromkeys((*hosts, *HERE)))
    path = server / CERTIFICATE
    if path.exists() and (not hosts or certificates.hosts_of(path.read_bytes()) == wanted):
        return
    certificate, key = certificates.new_server((authority / CA).read_bytes(), (authority / CA_KEY).read_bytes(), wanted)
    (server / KEY).unlink(missing_ok=True)
    write_secret(server / KEY, key)
    write_atomic(path, certificate)
    write_atomic(server / CA, (authority / CA).read_bytes())


def _add_client(authority: Path, server: Path, own: Path, client: str) -> None:
    """A key for a client that has none."""
    own.mkdir(exist_ok=True)
    own.chmod(0o700)
    write_atomic(own / CA, (authority / CA).read_bytes())
    if not (own / NODE_KEY).exists():
        private, public = certificates.new_node_key()
        write_secret(own / NODE_KEY, private)
        write_atomic(server / NODES / f"{client}.pub", public)


def _checklist(folder: Path, hosts: Sequence[str], clients: Sequence[str]) -> list[str]:
    address = f"{hosts[0]}:{PORT}"
    first = clients[0] if clients else "NAME"
    copies = [
        f"4. Copy each client's folder to its machine, and to no other: {folder / CLIENTS}/NAME/, for NAME in",
        f"     {', '.join(clients)}",
    ]
    return [
        f"1. Keep {folder / AUTHORITY}/ away from every network: who has it can pose as the server.",
        f"2. Copy {folder / SERVER}/ to the server ({', '.join(hosts)}) and start it there:",
        f"     grpo-fed deploy server {SERVER}",
        f"3. Open TCP port {PORT} on the server, for the clients' addresses alone. Clients need no open port.",
        *(copies if clients else [f"4. Make keys for clients: grpo-fed deploy init {folder} --client NAME"]),
        "5. Start each client there, one for each GPU:",
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
    """Serve until told to stop; an exit code. `folder` is what `init` made for the server; `say` gets a line or two.

    insecure: no encryption and no keys; `folder` may be None then. open_to_all: `flwr` is let in from other machines
    too, where anyone who reaches the port can then run code on all machines.
    """
    if insecure and folder is None:
        folder = Path("grpo-fed-server")
    if folder is None:
        raise ValueError("deploy server needs the folder that `grpo-fed deploy init` made for it, or --insecure")
    folder = folder.absolute()
    identity = None if insecure else _identity(folder)
    kept = folder / KEPT
    kept.mkdir(parents=True, exist_ok=True)
    kept.chmod(0o700)
    keys = {} if identity is None else {KEYS: str(kept / REGISTERED)}
    known = environment(more=keys)
    with _told_to_stop() as told, SupervisedProcesses(kept, known) as processes:
        link = SuperLink(processes, kept, port, host=host, identity=identity, open_to_all=open_to_all)
        link.start()
        connect(flower_home(), connection, link.address, None if identity is None else identity.authority)
        if identity is not None:
            _register(Flower(connection, known, kept), folder / NODES, kept / REGISTERED, say)
        say(f"ready at {host}:{port}; on this machine: grpo-fed run SCENARIO --engine flower --superlink {connection}")
        return _serve(Restarter(processes, link.commands), told, say)


def _identity(folder: Path) -> Identity:
    """What is in the server's folder."""
    for name in (CA, CERTIFICATE, KEY):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: is missing; `grpo-fed deploy init` makes it, --insecure goes without")
    return Identity(folder / CA, folder / CERTIFICATE, folder / KEY)


def _register(flower: Flower, keys: Path, path: Path, say: Say) -> None:
    """Let in those whose public keys are there, and no longer those whose keys are not."""
    registered: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
    wanted = {key.stem: key.read_text() for key in sorted(keys.glob("*.pub"))}
    for client, entry in list(registered.items()):
        if wanted.get(client) != entry["key"]:
            flower.unregister(entry["node"])
            del registered[client]
            say(f"client {client}: its key is let in no longer")
    for client, key in wanted.items():
        if client not in registered:
            registered[client] = {"key": key, "node": flower.register(keys / f"{client}.pub", client)}
            say(f"client {client}: its key is let in")
        write_atomic(path, json.dumps(registered, indent=1))
    write_atomic(path, json.dumps(registered, indent=1))


# A client ------------------------------------------------------------------------------------------------------------


def client(
    name: str,
    superlink: str,
    folder: Path | None,
    *,
    state: Path | None = None,
    insecure: bool = False,
    say: Say = print,
) -> int:
    """Be a client until told to stop; an exit code. `folder` is what `init` made for it; `superlink` is HOST:PORT.

    state: where it keeps what it learned between rounds, by default a folder of the user's own.
    """
    _refuse_bad_names([name])
    authority = key = None
    if not insecure:
        if folder is None:
            raise ValueError("deploy client needs the folder that `grpo-fed deploy init` made for it, or --insecure")
        authority, key = folder.absolute() / CA, folder.absolute() / NODE_KEY
        for path in (authority, key):
            if not path.is_file():
                raise ValueError(f"{path}: is missing; `grpo-fed deploy init` makes it, --insecure goes without")
    own = {} if state is None else {STATE: str(state.absolute())}
    with _told_to_stop() as told, TemporaryDirectory(prefix="grpo-fed-", ignore_cleanup_errors=True) as warm:
        known = environment(more={**own, **hearth.worker_environment(Path(warm))})
        with SupervisedProcesses(Path.home(), known) as processes:
            node = {node_name(name): node_command(name, superlink, authority, key)}
            commands = {**hearth.start_commands(Path(warm)), **node}
            for each, command in commands.items():
                processes.start(each, command)
            say(f"client {name} serves {superlink}")
            return _serve(Restarter(processes, commands), told, say)


# Both ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """A list that gets the signals that ask to stop."""
    told: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        told.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(upkeep: Restarter, told: Sequence[int], say: Say) -> int:
    """Start again what ends, until told to stop: 0 if asked to by SIGTERM, 130 on Ctrl-C."""
    while not told:
        for name in upkeep.look():
            say(f"{name} had ended, with {upkeep.codes[name]}: started again")
        time.sleep(POLL)
    return INTERRUPTED if told[0] == signal.SIGINT else 0
