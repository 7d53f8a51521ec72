"""The clients' keys: which of them a SuperLink accepts, a client's own key, and new ones for old.

The public keys in the server's folder `nodes/` decide. `registered.json` says for which client each node of the
SuperLink's was registered. Either it or the SuperLink's database may have been lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from grpo_fed.engines.deploy import certificates
from grpo_fed.engines.flower.control import ControlError
from grpo_fed.engines.flower.superlink import write_secret
from grpo_fed.runs.files import make_private_folder, write_atomic

Say = Callable[[str], None]


class NodeRegistry(Protocol):
    """What a SuperLink's Control API does with nodes' keys."""

    def list_keys(self) -> Mapping[bytes, int]:
        """Return the ids of the accepted nodes by their public keys, in the format of OpenSSH."""

    def register(self, key: Path, client: str) -> int:
        """Accept a client's node by the file with its public key, and return the node's id."""

    def unregister(self, node: int) -> None:
        """Accept a node no longer."""


def register_keys(control: NodeRegistry, keys: Path, path: Path, say: Say) -> None:
    """Let a SuperLink accept the public keys in a folder, and no others that were accepted from there.

    path: `registered.json`. A key that the SuperLink does not take is named with the cure, and keeps out nobody else.
    """
    accepted = dict(control.list_keys())
    is_lost = not path.is_file()
    registered: dict[str, dict[str, str]] = {} if is_lost else json.loads(path.read_text(encoding="utf-8"))
    wanted = {key.stem: key.read_text(encoding="utf-8") for key in sorted(keys.glob("*.pub"))}
    for client, entry in list(registered.items()):
        node = int(entry["node"])
        if node not in accepted.values():
            del registered[client]
            say(f"client {client}: the SuperLink's database does not have its key any more")
        elif wanted.get(client) != entry["key"]:
            control.unregister(node)
            del registered[client]
            say(f"client {client}: its key is no longer accepted")
    if is_lost:
        bodies = set(map(_key_body, wanted.values()))
        for public, node in accepted.items():
            if _key_body(public.decode()) not in bodies:
                control.unregister(node)
                say(
                    f"node {node}: its key is no longer accepted: {path.name} is lost, and {keys.name}/ has no such key"
                )
    by_key = {_key_body(public.decode()): node for public, node in accepted.items()}
    for client, key in wanted.items():
        if client in registered:
            continue
        try:
            known = by_key.get(_key_body(key))
            node = control.register(keys / f"{client}.pub", client) if known is None else known
        except (ControlError, ValueError) as error:
            say(
                f"client {client}: its key is not accepted: {error}; if the key was taken out before, Flower accepts it"
                f" no more: make another one with `grpo-fed deploy rotate FOLDER --client {client}`, copy it, and"
                " restart the server"
            )
            continue
        registered[client] = {"key": key, "node": str(node)}
        say(f"client {client}: its key is accepted")
        write_atomic(path, json.dumps(registered, indent=1), private=True)
    write_atomic(path, json.dumps(registered, indent=1), private=True)


def _key_body(key: str) -> str:
    """Return a public key in the format of OpenSSH without its comment."""
    return " ".join(key.split()[:2])


def make_own_key(folder: Path, client: str, file_name: str) -> Path:
    """Make a client's key on its own machine, and return the file with its public half, which is all that is sent.

    file_name: of the private key. ValueError if the folder has one.
    """
    private_file, public_file = folder / file_name, folder / f"{client}.pub"
    if private_file.exists():
        raise ValueError(f"{private_file}: exists; move it away to make another key for client {client}")
    make_private_folder(folder)
    private, public = certificates.make_node_key()
    write_secret(private_file, private)
    write_atomic(public_file, public)
    return public_file


def replace_key(folder: Path, client: str, file_name: str, nodes: Path) -> None:
    """Make a client another key; the folder of public keys gets the new one, and so the old one is not accepted."""
    private, public = certificates.make_node_key()
    make_private_folder(folder)
    (folder / file_name).unlink(missing_ok=True)
    write_secret(folder / file_name, private)
    write_atomic(nodes / f"{client}.pub", public)
