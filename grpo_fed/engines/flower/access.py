"""Flower's SuperLink with restricted access: other machines reach it as nodes alone.

Flower 1.41 serves three kinds of requests on one port: those of nodes, which have to have registered keys; those of
`flwr`, which registers keys and starts runs, that is code on every machine, without any check; and those of the
server's own apps. So this accepts the last two only from the SuperLink's own machine; other machines can use an SSH
tunnel.

`python -m grpo_fed.engines.flower.access` takes the arguments of `flower-superlink`, and `--open-to-all`, with which it
accepts everything from everywhere. In either case it has an exchange (`grpo_fed/engines/exchange/`).
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any, TypeAlias, final

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.exchange.routes import ExchangeRoutes
from grpo_fed.engines.flower.superlink import OPEN_TO_ALL
from grpo_fed.engines.wire.flower_private import run_superlink

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

NODE_REQUESTS = ("/v1/fleet/", protocol.NODE)
"""The beginnings of the paths that nodes use; there the SuperLink checks keys."""
KEEP_ALIVE = 60
"""Seconds for which an idle connection stays open: a new one costs a handshake."""
SHUTDOWN_SECONDS = 1
"""Seconds that requests have to end when the SuperLink is stopped."""


def main(arguments: Sequence[str], link: socket.socket | None = None) -> None:
    """Run `flower-superlink` with the middleware; requests that wait are not logged, since they never end.

    link: None, since it asks no launcher for anything.
    """
    logging.getLogger("uvicorn.access").addFilter(lambda record: protocol.ROOT not in record.getMessage())
    middleware: list[type[Any]] = (
        [ExchangeRoutes] if OPEN_TO_ALL in arguments else [LocalOnlyMiddleware, ExchangeRoutes]
    )
    run_superlink(
        [argument for argument in arguments if argument != OPEN_TO_ALL],
        middleware,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


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
    main(sys.argv[1:])
