"""What a stranger may send to a SuperLink: uvicorn with the limits, and sockets that keep no rule."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn

from grpo_fed.engines.flower import limits
from grpo_fed.engines.flower.accounts import find_peer_uid
from grpo_fed.engines.flower.limits import BodyLimits, LimitedConnection
from tests.support.small_federation import until

NODE, OTHER = b"/v1/fleet/pull-messages", b"/v1/control/list-runs"


class KnownNodes:
    """What the SuperLink knows: a head with the key `registered` is signed by node 7."""

    def __init__(self, app: Any) -> None:
        assert app == "flower"

    def find_node(self, headers: Any) -> int | None:
        key = dict(headers).get(b"key")
        if key is None:
            raise PermissionError("the node's signature is not valid")
        return 7 if key == b"registered" else None


@pytest.fixture(autouse=True)
def _known_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SuperLinkState", KnownNodes)


class Service:
    """A server with the limits before an app that answers with the number of bytes it was sent."""

    def __init__(self, needs_keys: bool) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.received: list[int] = []
        self.limits = BodyLimits(self._answer, needs_keys)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self.limits({**scope, "app": "flower"}, receive, send)

        config = uvicorn.Config(
            app, http=LimitedConnection, ws="none", lifespan="off", log_level="critical",
            loop="grpo_fed.engines.flower.limits:make_loop",
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        assert not event["more_body"]
        self.received.append(len(event["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def serve(needs_keys: bool = True) -> Iterator[Service]:
    service = Service(needs_keys)
    service.thread.start()
    until(lambda: service.server.started)
    try:
        yield service
    finally:
        service.server.should_exit = True
        service.thread.join(10)
        service.listener.close()
        LimitedConnection.unproven.clear()


def send(service: Service, *parts: bytes) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", service.port), 10)
    link.settimeout(10)
    with suppress(ConnectionError):
        for part in parts:
            link.sendall(part)
    return link


def status(link: socket.socket) -> int:
    """Read the status of an answer; 0 if the connection is closed without one."""
    try:
        line = link.recv(4096)
    except ConnectionError:
        return 0
    return int(line.split()[1]) if line else 0


def is_closed(link: socket.socket) -> bool:
    try:
        return not link.recv(4096)
    except ConnectionError:
        return True


def post(path: bytes, length: int | None, *headers: bytes) -> bytes:
    size = [b"transfer-encoding: chunked"] if length is None else [b"content-length: %d" % length]
    return b"\r\n".join([b"POST %s HTTP/1.1" % path, b"host: here", *size, *headers, b"", b""])


def test_a_hundred_gigabytes_are_refused_before_their_first_byte():
    with serve() as service:
        for path in (NODE, OTHER):
            with send(service, post(path, 100 * 10**9)) as link:
                assert status(link) == 413
                assert is_closed(link)
        assert service.received == []


def test_a_long_body_needs_a_key_whether_or_not_it_says_how_long_it_is():
    chunk = b"%x\r\n%s\r\n" % (2**14, bytes(2**14))
    with serve() as service:
        with send(service, post(NODE, limits.UNPROVEN_BODY + 1)) as link:
            assert status(link) == 401
        with send(service, post(NODE, None), *(chunk for _ in range(50))) as link:
            assert status(link) in (401, 0), "the connection is closed while more of the body comes"
        until(lambda: service.limits.held == 0)
        with send(service, post(NODE, limits.UNPROVEN_BODY), bytes(limits.UNPROVEN_BODY)) as link:
            assert status(link) == 200
        with send(service, post(OTHER, None), *(chunk for _ in range(50)), b"0\r\n\r\n") as link:
            assert status(link) == 200
        assert service.received == [limits.UNPROVEN_BODY, 50 * 2**14]


def test_chunks_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "MOST_BODY", 100_000)
    chunk = b"%x\r\n%s\r\n" % (2**14, bytes(2**14))
    with serve(needs_keys=False) as service, send(service, post(NODE, None), *(chunk for _ in range(10))) as link:
        assert status(link) in (413, 0), "the connection is closed while more of the body comes"
        assert service.received == []


def test_bodies_of_all_requests_together_are_limited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "MOST_HELD", 100_000)
    with serve(needs_keys=False) as service:
        with send(service, post(NODE, 80_000), bytes(70_000)) as first:
            until(lambda: service.limits.held == 70_000)
            with send(service, post(NODE, 80_000), bytes(80_000)) as second:
                assert status(second) in (503, 0), "the connection is closed while more of the body comes"
            first.sendall(bytes(10_000))
            assert status(first) == 200
        assert (service.limits.held, service.received) == (0, [80_000])


def test_slow_heads_and_bodies_are_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(limits, "SILENT_SECONDS", 0.3)
    with serve() as service:
        links = [send(service), send(service, b"POST / HT"), send(service, post(NODE, 100), b"some")]
        for link in links:
            with link:
                assert status(link) == 408
                assert is_closed(link)


def test_a_body_that_comes_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "SILENT_SECONDS", 0.4)
    with serve() as service, send(service, post(NODE, 1000)) as link:
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < began + 2:
                link.sendall(b".")
                time.sleep(0.1)
        assert status(link) in (408, 0)
        assert service.received == []


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nx: " + b"x" * 10**5, b"GET /" + b"x" * 10**5])
def test_a_head_that_is_too_long_is_refused_before_it_has_ended(head: bytes):
    with serve() as service, send(service, head) as link:
        assert status(link) == 431


def test_many_headers_in_one_packet_are_refused():
    with serve() as service, send(service, post(NODE, 0, *(b"x%d: y" % i for i in range(6000)))) as link:
        assert status(link) == 431


def test_strangers_have_few_connections_and_a_success_makes_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "UNPROVEN_BY_ADDRESS", 3)
    with serve() as service:
        links = [send(service) for _ in range(3)]
        until(lambda: LimitedConnection.unproven.total() == 3)
        with send(service, post(NODE, 0)) as refused:
            assert status(refused) == 0
        links[0].sendall(post(NODE, 0))
        assert status(links[0]) == 200
        with send(service, post(NODE, 0)) as accepted:
            assert status(accepted) == 200
        for link in links:
            link.close()
        until(lambda: LimitedConnection.unproven.total() == 0)


def test_a_signed_head_lets_a_long_body_in():
    size = limits.UNPROVEN_BODY + 1
    with serve() as service:
        with send(service, post(NODE, size, b"key: registered"), bytes(size)) as link:
            assert status(link) == 200
        with send(service, post(NODE, size, b"key: another")) as link:
            assert status(link) == 401
        assert service.received == [size]


def test_the_account_at_the_other_end_is_read_from_linuxs_table(tmp_path: Any):
    """A closed connection is listed as root's, without an inode; an account must not pass for root that way."""
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = "   0: 0100007F:1388 0100007F:2384 {} 00000000:00000000 00:00000000 00000000  {}        0 {} 1 0 20 4 30\n"
    table = tmp_path / "tcp"
    peer, own = ("127.0.0.1", 0x1388), ("127.0.0.1", 0x2384)
    table.write_text(head + row.format("01", 1001, 77))
    assert find_peer_uid(peer, own, [table]) == 1001
    assert find_peer_uid(own, peer, [table]) is None
    assert find_peer_uid(("::ffff:127.0.0.1", 0x1388), own, [table]) == 1001
    for state, inode in (("06", 77), ("01", 0)):
        table.write_text(head + row.format(state, 0, inode))
        assert find_peer_uid(peer, own, [table]) is None
    assert find_peer_uid(None, own) is None


def test_a_connection_of_this_process_belongs_to_its_account():
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as here:
        peer, own = here.getpeername(), here.getsockname()
        assert peer == client.getsockname()
        assert find_peer_uid(peer, own) == os.geteuid()
