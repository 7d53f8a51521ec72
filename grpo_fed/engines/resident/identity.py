"""A node's key. Where no key was made for a client, the node makes its own and finds it again after a restart."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key

from grpo_fed.runs.files import make_private_folder

_locks: dict[Path, IO[bytes]] = {}
"""Held as long as this process lives."""


def load_key(path: Path) -> EllipticCurvePrivateKey:
    """Load a private key in the format of OpenSSH; ValueError if it is none of the elliptic curves of Flower."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no private key of a node: {error}") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError(f"{path}: is a {type(key).__name__}; nodes have keys of elliptic curves")
    return key


def find_own_key(path: Path) -> EllipticCurvePrivateKey:
    """Return the key that this node made itself, or make it.

    Of two nodes that would use the same file at the same time, the second one gets a key that is not saved.
    """
    make_private_folder(path.parent)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return generate_private_key(SECP384R1())
    _locks[path] = file
    content = file.read()
    if content:
        return load_key(path)
    key = generate_private_key(SECP384R1())
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    file.write(key.private_bytes(encoding, form, serialization.NoEncryption()))
    file.flush()
    return key
