"""Flower's configuration of connections to SuperLinks, `$FLWR_HOME/config.toml`, which `flwr` reads too."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from grpo_fed.runs.files import write_atomic


@dataclass(frozen=True)
class SuperLinkAddress:
    """Where a SuperLink is, and how it is trusted."""

    address: str
    """HOST:PORT."""
    authority: Path | None
    """The certificate that signed the SuperLink's; None for no encryption."""


def find_flower_home() -> Path:
    """Return the folder with the configuration of Flower's command line."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def write_connection(home: Path, name: str, link: SuperLinkAddress) -> None:
    """Write a connection into Flower's configuration, and keep the others."""
    path = home / "config.toml"
    config = _read_config(path)
    trust = {"insecure": True} if link.authority is None else {"root-certificates": str(link.authority)}
    connection = {"address": link.address, **trust}
    connections = config.setdefault("superlink", {"default": name})
    if connections.get(name) != connection:
        connections[name] = connection
        home.mkdir(parents=True, exist_ok=True)
        write_atomic(path, tomli_w.dumps(config))


def read_connection(name: str) -> SuperLinkAddress:
    """Read a connection from Flower's configuration; ValueError if it has none of that name, or no address for it."""
    path = find_flower_home() / "config.toml"
    entries = _read_config(path).get("superlink", {})
    names = [key for key, value in entries.items() if isinstance(value, dict)]
    if name not in names:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise ValueError(
            f"{path}: has no SuperLink {name}, {has}; `grpo-fed deploy server` adds the one that it starts"
        )
    entry = entries[name]
    if "address" not in entry:
        raise ValueError(f'{path}: superlink.{name} has no address; add a line such as address = "127.0.0.1:9092"')
    if entry.get("insecure"):
        return SuperLinkAddress(str(entry["address"]), None)
    if "root-certificates" not in entry:
        raise ValueError(
            f"{path}: superlink.{name} has no root-certificates; add the path of the server's ca.pem,"
            " or insecure = true"
        )
    authority = path.parent / Path(str(entry["root-certificates"])).expanduser()
    if not authority.is_file():
        raise ValueError(f"{authority}: is missing; superlink.{name} in {path} names it as root-certificates")
    return SuperLinkAddress(str(entry["address"]), authority)


def _read_config(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
