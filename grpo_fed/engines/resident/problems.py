"""What a client says when it cannot connect: the reason in plain words, and the cure."""

from __future__ import annotations

CAUSES = {
    "certificate has expired": "the server's certificate has expired: make another one with `grpo-fed deploy rotate"
    " FOLDER --server`, copy it to the server, and restart that",
    "certificate is not yet valid": "the server's certificate is not valid yet: check the clocks of both machines",
    "Hostname mismatch": "the server's certificate is not for this address: call `grpo-fed deploy init` again with it"
    " as --host, or use an address that the certificate is for",
    "IP address mismatch": "the server's certificate is not for this address: call `grpo-fed deploy init` again with it"
    " as --host, or use an address that the certificate is for",
    "certificate verify failed": "the server's certificate was not signed by the authority whose ca.pem this client"
    " has: copy the ca.pem of the server's deployment, and check the address",
    "WRONG_VERSION_NUMBER": "what listens there does not use TLS: check the address, and whether the server was started"
    " with --insecure",
    "Connection refused": "nothing listens at this address: check host and port, and whether the server runs",
    "Name or service not known": "this name has no address: check it",
    "No route to host": "there is no way to this address: check it, and the firewall",
    "timed out": "nothing answers at this address: check it, and the firewall",
    "Timeout": "nothing answers at this address: check it, and the firewall",
}
"""By words in the errors of TLS and of the system, the first that fits."""


def explain_problem(error: Exception) -> str:
    """Say why there is no connection, in plain words before those of the system, as far as they are known."""
    text = str(error)
    for words, cause in CAUSES.items():
        if words in text:
            return f"{cause} ({text})"
    return text
