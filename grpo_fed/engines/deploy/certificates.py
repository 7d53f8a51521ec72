"""Certificates and keys of a deployment: an authority signs the server's certificate, and every node has a key."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS, SERVER_DAYS = 3650, 825
"""Days for which certificates are valid."""
WARNING_DAYS = 30
"""Days before its end from which a certificate is warned of."""
SECONDS = 10.0
"""Seconds that a server has to show its certificate."""
CLOCK_DIFFERENCE = timedelta(hours=1)
"""Certificates are valid from so long ago, since the clocks of machines differ."""


def make_authority() -> tuple[bytes, bytes]:
    """Make a certificate that signs others, and its private key, in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("grpo_fed deployment")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _certificate(name, name, key.public_key(), key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _private_key(key)


def make_server_certificate(authority: bytes, authority_key: bytes, hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """Make a certificate for these names and addresses, and its private key, in PEM."""
    issuer = x509.load_pem_x509_certificate(authority)
    issuer_key = serialization.load_pem_private_key(authority_key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey), "`make_authority` made the key"
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _certificate(_name(hosts[0]), issuer.subject, key.public_key(), issuer_key.public_key(), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(issuer_key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _private_key(key)


def read_hosts(certificate: bytes) -> tuple[str, ...]:
    """Read the names and addresses for which a server's certificate was made."""
    extensions = x509.load_pem_x509_certificate(certificate).extensions
    hosts = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(host.value) for host in hosts)


def check_validity(*files: Path, now: datetime | None = None) -> list[str]:
    """Warn of certificates that expire within `WARNING_DAYS`; ValueError for one that has expired or is not valid yet.

    now: the time, by default this machine's.
    """
    lines = []
    for file in files:
        try:
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: is no certificate: {error}") from None
        lines += _warn_of_end(certificate, str(file), now or datetime.now(UTC))
    return lines


def check_server(address: str, authority: Path, now: datetime | None = None) -> list[str]:
    """Warn of the certificate that a server shows if it expires within `WARNING_DAYS`.

    address: HOST:PORT. now: as above. OSError if no connection is made, since the certificate is not accepted, too.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    trust = ssl.create_default_context(cafile=str(authority))
    with (
        socket.create_connection((host, int(port)), SECONDS) as link,
        trust.wrap_socket(link, server_hostname=host) as encrypted,
    ):
        shown = encrypted.getpeercert(binary_form=True)
    assert shown is not None, "the server was made to show one"
    name = f"the certificate of the server at {address}"
    return _warn_of_end(x509.load_der_x509_certificate(shown), name, now or datetime.now(UTC))


def _warn_of_end(certificate: x509.Certificate, name: str, now: datetime) -> list[str]:
    """Return a warning of a certificate that expires soon, if it does; ValueError if it is not valid now."""
    until, since = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    cure = (
        "make another one with `grpo-fed deploy rotate FOLDER --server`, copy it, and restart the server"
        if not _is_authority(certificate)
        else "make a new deployment with `grpo-fed deploy init`, since all clients trust this one"
    )
    if now >= until:
        raise ValueError(f"{name}: expired on {until:%Y-%m-%d}; {cure}")
    if now < since:
        raise ValueError(f"{name}: is not valid before {since:%Y-%m-%d %H:%M} UTC; check this machine's clock")
    if now > until - timedelta(days=WARNING_DAYS):
        return [f"{name}: expires in {(until - now).days} days, on {until:%Y-%m-%d}; {cure}"]
    return []


def _is_authority(certificate: x509.Certificate) -> bool:
    return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def make_node_key() -> tuple[bytes, bytes]:
    """Make a node's private and public key, in the format of OpenSSH."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    return key.private_bytes(encoding, form, serialization.NoEncryption()), public + b"\n"


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    """Begin a certificate with what both kinds have."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_DIFFERENCE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())
