"""Flower's SuperLink with restricted access: other machines reach it as nodes alone, and this one as one account alone.

Flower 1.41 serves three kinds of requests on one port: those of nodes, which have to have registered keys; those of
`flwr`, which registers keys and starts runs, that is code on every machine, without any check; and those of the
server's own apps. So this accepts the last two only from the SuperLink's own machine, where other machines can use an
SSH tunnel, and there only from processes of its own account and of root. A SuperLink that listens on loopback alone
accepts nodes from these processes alone, too.

`python -m grpo_fed.engines.flower.access` takes the arguments of `flower-superlink`, and `--open-to-all`, with which it
accepts everything from everywhere. In either case it has the limits of `limits.py` and an exchange
(`grpo_fed/engines/exchange/`).
"""

from __future__ import annotations

import logging
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv6Address, ip_address
from typing import Any, TypeAlias, final

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.exchange.routes import ExchangeRoutes
from grpo_fed.engines.flower import limits
from grpo_fed.engines.flower.accounts import is_known_here, is_own_account
from grpo_fed.engines.flower.launcher import run_and_exit
from grpo_fed.engines.flower.limits import CONNECTION, NODE_REQUESTS, BodyLimits, LimitedConnection
from grpo_fed.engines.flower.own_scenario import OwnScenario
from grpo_fed.engines.flower.superlink import NEEDS_KEYS, OPEN_TO_ALL
from grpo_fed.engines.wire.flower_private import run_superlink

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

KEEP_ALIVE = 60
"""Seconds for which an idle connection stays open: a new one costs a handshake."""
SHUTDOWN_SECONDS = 0
"""Seconds that requests have to end when the SuperLink is stopped: those that wait for messages do not end by
themselves, and what is cut off is sent again."""


def main(arguments: Sequence[str], link: socket.socket | None = None) -> None:
    """Run `flower-superlink` with the middleware; requests that wait are not logged, since they never end.

    link: None, since it asks no launcher for anything.
    """
    logging.getLogger("uvicorn.access").addFilter(lambda record: protocol.ROOT not in record.getMessage())
    middleware: list[Callable[..., Any]] = [partial(BodyLimits, needs_keys=NEEDS_KEYS in arguments), ExchangeRoutes]
    if NEEDS_KEYS in arguments:
        middleware.append(OwnScenario)
    if OPEN_TO_ALL not in arguments:
        host = arguments[arguments.index("--host") + 1] if "--host" in arguments else "0.0.0.0"
        middleware.insert(0, partial(LocalOnlyMiddleware, is_private=_is_loopback(host)))
    _allow_many_files()
    run_superlink(
        [argument for argument in arguments if argument != OPEN_TO_ALL],
        middleware,
        http=LimitedConnection,
        ws="none",
        loop=f"{limits.__name__}:{limits.make_loop.__name__}",
        # Whatever FORWARDED_ALLOW_IPS says: with "*" everyone could pose as this machine by a header.
        forwarded_allow_ips=["127.0.0.1", "::1"],
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def _allow_many_files() -> None:
    """Let this process have as many connections as `limits.py` allows, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.MOST_CONNECTIONS + 1024
    if 0 <= soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


@final
class LocalOnlyMiddleware:
    """Refuses requests that are not those of nodes from other machines, and from other accounts of this one."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], is_private: bool = False) -> None:
        """is_private: whether nodes, too, are processes of this account."""
        self.app, self._is_private = app, is_private

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "lifespan" or not (reason := self._refuse(scope)):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

    def _refuse(self, scope: Scope) -> str:
        """Say why a request is refused; empty if it is not."""
        if scope["path"].startswith(NODE_REQUESTS) and not self._is_private:
            return ""
        if not is_local(scope):
            return "only from the SuperLink's own machine"
        if is_known_here() and not is_own_account(scope.get("extensions", {})[CONNECTION].peer_uid):
            return "only from the account that the SuperLink runs as, and from root"
        return ""


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


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
