"""Flower's SuperLink behind a gate: from other machines only nodes are let in.

Flower 1.41 serves three things on one port: nodes, which it knows by their keys; `flwr`, which registers keys and
starts runs, that is code on every machine, and is asked for nothing; and the server's own apps. So this lets the
latter two in from the SuperLink's own machine alone; from elsewhere an SSH tunnel is the way to them.

`python -m grpo_fed.engines.flower.access` takes the arguments of `flower-superlink`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import IPv6Address, ip_address
from typing import Any, TypeAlias, final

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = "/v1/fleet/"
"""Where nodes speak to the SuperLink, which asks for their keys."""


def main() -> None:
    """`flower-superlink`, with the gate in front."""
    extensions.get_middleware = lambda: (Middleware(LocalOnlyMiddleware),)
    flower_superlink()


@final
class LocalOnlyMiddleware:
    """Refuses requests of other machines that are not a node's."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through, or answer 403."""
        if scope["type"] == "lifespan" or scope["path"].startswith(OPEN) or is_local(scope):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"only from the SuperLink's own machine\n"})


def is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine: over loopback, or from the very address that it was sent to."""
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    try:
        address = ip_address(client[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or bool(server and server[0] == client[0])


if __name__ == "__main__":
    main()
