"""Key agreement, key derivation, streams and encryption: those of `cryptography`, with their parameters chosen here.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 and ChaCha20-Poly1305 (RFC 8439). Every key is used for one
message or one stream, so nonces are zero.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES, TAG_BYTES = 32, 16
"""Of keys, private and public; and by how much a message is longer encrypted."""


class InvalidShareError(ValueError):
    """A message between two clients was changed on its way, or is none."""


def public_of(private: bytes) -> bytes:
    """Return the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, session: bytes, purpose: str) -> bytes:
    """Derive the key that two parties share, for one purpose in one session; ValueError for an invalid public key."""
    agreed = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return derive(agreed, session, purpose)


def derive(secret: bytes, session: bytes, purpose: str) -> bytes:
    """Derive a key from a secret, for one purpose in one session."""
    return HKDF(SHA256(), KEY_BYTES, session, b"grpo_fed secure aggregation 1: " + purpose.encode()).derive(secret)


def stream(key: bytes, size: int) -> np.ndarray:
    """Return the beginning of a key's stream, [size] uint32."""
    encryptor = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    words: np.ndarray = np.frombuffer(encryptor.update(bytes(4 * size)), "<u4")
    return words


def encrypt(key: bytes, message: bytes, session: bytes) -> bytes:
    """Encrypt the one message of a key."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), message, session)


def decrypt(key: bytes, message: bytes, session: bytes) -> bytes:
    """Undo `encrypt`; InvalidShareError if the message is not what was encrypted."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), message, session)
    except (InvalidTag, ValueError) as error:
        raise InvalidShareError("it was changed on its way") from error


def commit(secret: bytes, session: bytes) -> bytes:
    """Return a hash of a random secret, by which it is recognised later."""
    return hashlib.sha256(b"grpo_fed secure aggregation 1: commitment" + session + secret).digest()
