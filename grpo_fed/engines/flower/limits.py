"""Limits on what a SuperLink accepts before it knows who sends it: connections, heads of requests, bodies, and time.

Flower reads the whole body of a request before it asks for a key. So a body is read here first, and one that is longer
than `UNPROVEN_BODY` only if the head of its request is signed with a registered key. Refused requests are answered with
413 (too long), 408 (too slow), 431 (head too long), 401 (no key) or 503 (too much at once), and their connection is
closed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, ClassVar, TypeAlias, final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.flower.accounts import find_peer_uid
from grpo_fed.engines.wire.flower_private import SuperLinkState

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

NODE_REQUESTS = ("/v1/fleet/", protocol.NODE)
"""The beginnings of the paths that nodes use; there the SuperLink checks keys."""
CONNECTION = "grpo_fed"
"""The extension of a request's scope with its `LimitedConnection`."""

MOST_HEAD = 32 * 1024
"""The most bytes of a request's line and headers."""
HEAD_SECONDS = 10.0
"""Seconds from the beginning of a connection, or of a request on it, to the end of the request's head."""
CLOSING_SECONDS = 1.0
"""Seconds for which a connection that is closed may still send."""
UNPROVEN_BODY = 64 * 1024
"""The most bytes of a node's request whose head is not signed with a registered key."""
MOST_BODY = 2**30 + 2**16
"""The most bytes of any request's body."""
MOST_HELD = 2**32
"""The most bytes of all bodies that are being read."""
SILENT_SECONDS = 20.0
"""Seconds without a byte after which a body is given up."""
LEAST_SPEED = 16 * 1024
"""Bytes a second that a body has to come with, beyond `SILENT_SECONDS`."""
UNPROVEN_BY_ADDRESS, UNPROVEN_CONNECTIONS, MOST_CONNECTIONS = 64, 512, 8192
"""The most connections that have not had a successful request, from one address and in all; the most of any kind."""


@final
class LimitedConnection(HttpToolsProtocol):
    """A connection of uvicorn that is closed if there are too many, or if a head is too long or too slow."""

    unproven: ClassVar[Counter[str]] = Counter()
    """By address, the open connections that have not had a successful request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and close it at once if there are too many."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._is_unproven = False
        self._head_bytes, self._is_head, self._is_answering = 0, True, False
        self._uid: int | None = None
        self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        unproven = LimitedConnection.unproven
        if (
            len(self.connections) > MOST_CONNECTIONS
            or unproven.total() >= UNPROVEN_CONNECTIONS
            or unproven[self._address] >= UNPROVEN_BY_ADDRESS
        ):
            transport.abort()
            return
        self._is_unproven = True
        unproven[self._address] += 1

    def prove(self) -> None:
        """Note that a request on this connection has succeeded, so that it counts among the unproven ones no longer."""
        if self._is_unproven:
            self._is_unproven = False
            LimitedConnection.unproven[self._address] -= 1
            if not LimitedConnection.unproven[self._address]:
                del LimitedConnection.unproven[self._address]

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection no longer."""
        self._timer.cancel()
        self.prove()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Refuse a head that is too long, before all of it is in memory."""
        self._head_bytes += len(data) if self._is_head else 0
        super().data_received(data)
        if self._is_head and self._head_bytes > MOST_HEAD:
            self._refuse(431, b"Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Begin a request, which may be the second one of a packet: the time of its head begins here."""
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]
        self._is_head = True
        self._timer.cancel()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def on_headers_complete(self) -> None:
        """Begin to answer a request, unless its head was too long."""
        self._is_head = False
        self._timer.cancel()
        self._head_bytes = 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MOST_HEAD:
            self._refuse(431, b"Request Header Fields Too Large")
            return
        self._is_answering = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body, unless its request was refused before there was anything to answer it."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request, unless it was refused before there was anything to answer it."""
        if not self.transport.is_closing():
            super().on_message_complete()

    @property
    def peer_uid(self) -> int | None:
        """The account of this machine whose process is at the other end; None if that is not known."""
        if self._uid is None and self.transport is not None:
            self._uid = find_peer_uid(
                self.transport.get_extra_info("peername"), self.transport.get_extra_info("sockname")
            )
        return self._uid

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, b"Request Timeout")

    def _refuse(self, status: int, reason: bytes) -> None:
        """Answer without a request that could be answered, and close the connection."""
        head = b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % (status, reason)
        if not self._is_answering:
            self.transport.write(head)
        self.transport.close()
        self._cut_off()

    def on_response_complete(self) -> None:
        """Cut a connection off that is closed with the answer, if its other end goes on sending."""
        super().on_response_complete()
        self._is_answering = bool(self.pipeline)
        if self.transport.is_closing():
            self._cut_off()

    def _cut_off(self) -> None:
        """Give the other end a moment to read the answer; TLS would read for 30 seconds what it still sends."""
        self.loop.call_later(CLOSING_SECONDS, self.transport.abort)


@final
class BodyLimits:
    """Reads the bodies of requests before anything else does, within the limits of this module."""

    def __init__(self, app: App, needs_keys: bool = False) -> None:
        """needs_keys: whether nodes have to have registered keys."""
        self._app, self._needs_keys = app, needs_keys
        self.held = 0
        """Bytes of all bodies that are being read now."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(self)
        try:
            content = await self._read(scope, receive, body)
        except _RefusedRequestError as refusal:
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": f"{refusal}\n".encode()})
            return
        finally:
            body.release()
        events: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": content, "more_body": False}]
        del content

        async def replay() -> MutableMapping[str, Any]:
            return events.pop() if events else await receive()

        async def watched(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400 and scope["path"] != protocol.WHO:
                connection = scope.get("extensions", {}).get(CONNECTION)
                if connection is not None:
                    connection.prove()
            await send(message)

        await self._app(scope, replay, watched)

    async def _read(self, scope: Scope, receive: Receive, body: _Body) -> bytes:
        """Read the body of a request."""
        declared = _find_length(scope["headers"])
        is_proven = not (self._needs_keys and scope["path"].startswith(NODE_REQUESTS))
        if declared is not None:
            _check_length(declared)
            if declared > UNPROVEN_BODY and not is_proven:
                await _check_key(scope)
                is_proven = True
        began, parts, more = time.monotonic(), list[bytes](), True
        while more:
            seconds = min(SILENT_SECONDS, began + SILENT_SECONDS + body.size / LEAST_SPEED - time.monotonic())
            try:
                event = await asyncio.wait_for(receive(), max(seconds, 0.001))
            except TimeoutError:
                raise _RefusedRequestError(408, "the body comes too slowly") from None
            if event["type"] == "http.disconnect":
                raise _RefusedRequestError(400, "the connection was closed")
            parts.append(event.get("body", b""))
            more = event.get("more_body", False)
            body.add(len(parts[-1]))
            _check_length(body.size)
            if body.size > UNPROVEN_BODY and not is_proven:
                await _check_key(scope)
                is_proven = True
        return b"".join(parts)


class _RefusedRequestError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Body:
    """Counts the bytes of one body among those of all."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits, self.size = limits, 0

    def add(self, size: int) -> None:
        """Count more bytes; refuse the request if there are too many of all."""
        self.size += size
        self._limits.held += size
        if self._limits.held > MOST_HELD:
            raise _RefusedRequestError(503, "too many requests are being read; try again")

    def release(self) -> None:
        """Count the body no longer."""
        self._limits.held -= self.size


def _find_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """Return the length that a request declares; None for one whose body comes in chunks, or that has none."""
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else MOST_BODY + 1
    return None


def _check_length(size: int) -> None:
    if size > MOST_BODY:
        raise _RefusedRequestError(413, f"a body of more than {MOST_BODY} bytes")


async def _check_key(scope: Scope) -> None:
    """Refuse a long request whose head is not signed with a registered key."""
    try:
        node = await asyncio.to_thread(SuperLinkState(scope["app"]).find_node, scope["headers"])
    except PermissionError as error:
        raise _RefusedRequestError(401, f"a body of more than {UNPROVEN_BODY} bytes needs a key: {error}") from None
    if node is None:
        raise _RefusedRequestError(401, f"a body of more than {UNPROVEN_BODY} bytes needs a registered key")


class _TlsTimeout:
    """Gives the loop's servers less time for the handshake of TLS than its own 60 seconds."""

    async def create_server(self, *arguments: Any, **options: Any) -> Any:
        """Create a server."""
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = HEAD_SECONDS
        return await super().create_server(*arguments, **options)  # type: ignore[misc]


def make_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop, of uvloop where that is installed, whose servers give up slow handshakes."""
    try:
        from uvloop import Loop
    except ImportError:
        Loop = asyncio.SelectorEventLoop  # type: ignore[assignment,misc]

    kind: type[asyncio.AbstractEventLoop] = type("LimitedLoop", (_TlsTimeout, Loop), {})
    return kind()
