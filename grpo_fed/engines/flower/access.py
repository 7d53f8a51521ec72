"""Flower's SuperLink with restricted access: other machines reach it as nodes alone.

Flower 1.41 serves three kinds of requests on one port: those of nodes, which have to have registered keys; those of
`flwr`, which registers keys and starts runs, that is code on every machine, without any check; and those of the
server's own apps. So this accepts the last two only from the SuperLink's own machine; other machines can use an SSH
tunnel.

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

NODE_REQUESTS = "/v1/fleet/"
"""The beginning of the paths that nodes use; there the SuperLink checks keys."""


def main() -> None:
    """Run `flower-superlink` with the middleware."""
    extensions.get_middleware = lambda: (Middleware(LocalOnlyMiddleware),)
    flower_superlink()


@final
class LocalOnlyMiddleware:
    """Refuses requests from other machines that are not those of nodes."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "lifespan" or scope["path"].startswith(NODE_REQUESTS) or is_local(scope):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"only from the SuperLink's own machine\n"})


def is_local(scope: Scope) -> bool:
    """Return whether a request comes from this machine: over loopback, or from the address that it was sent to."""
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
