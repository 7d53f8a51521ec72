"""Which account of this machine is at the other end of a connection over loopback, on Linux."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""Linux's tables of connections."""
ESTABLISHED = "01"
ROOT = 0


def is_known_here() -> bool:
    """Return whether this system says which account a connection belongs to."""
    return sys.platform == "linux" and TABLES[0].exists()


def is_own_account(uid: int | None) -> bool:
    """Return whether an account is the one of this process, or root."""
    return uid is not None and uid in (os.geteuid(), ROOT)


def find_peer_uid(peer: Any, own: Any, tables: Iterable[Path] = TABLES) -> int | None:
    """Return the id of the account whose process is at the other end of a connection; None if none is found.

    peer, own: the addresses of both ends, as sockets give them. A connection whose other end is closed already has no
    account any more: Linux lists it as root's, so it counts as unknown.
    """
    if not peer or not own:
        return None
    wanted = _normalise(peer), _normalise(own)
    for table in tables:
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] != ESTABLISHED or fields[9] == "0":
                continue
            if (_parse(fields[1]), _parse(fields[2])) == wanted:
                return int(fields[7])
    return None


def _normalise(address: Any) -> tuple[str, int]:
    """Write an address without the form in which IPv6 has those of IPv4."""
    host = ip_address(str(address[0]).partition("%")[0])
    if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
        host = host.ipv4_mapped
    return str(host), int(address[1])


def _parse(field: str) -> tuple[str, int]:
    """Parse an address of a table: 32-bit words in the order of this machine's bytes, and the port."""
    text, _, port = field.partition(":")
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return _normalise((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
