"""The proxy that stands in for a network: what it adds, and that it can be cut."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.deployment_nodes import format_table
from benchmarks.network import Proxy


@pytest.fixture
def echo() -> Iterator[int]:
    """Serve connections that give back what they get, and return the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    while data := connection.recv(1000):
                        connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_bytes_take_the_latency_in_each_direction(echo: int):
    with Proxy(echo, latency=0.1) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        began = time.monotonic()
        connection.sendall(b"there and back")
        assert connection.recv(100) == b"there and back"
        assert time.monotonic() - began >= 0.2


def answer(connection: socket.socket, data: bytes) -> bytes:
    """Send bytes, and return what comes back; nothing if the connection is broken."""
    try:
        connection.sendall(data)
        return connection.recv(100)
    except (ConnectionResetError, BrokenPipeError):
        return b""


def test_a_cut_network_breaks_connections_until_it_is_healed(echo: int):
    with Proxy(echo) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            assert answer(connection, b"one") == b"one"
            proxy.cut()
            assert answer(connection, b"two") == b""
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            assert answer(connection, b"three") == b""
        proxy.heal()
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            assert answer(connection, b"four") == b"four"


def test_a_trip_is_modelled_as_two_round_trips():
    lines = [
        {"nodes": 10, "latency": latency, "seconds": [seconds], "processor": [0.008], "load": 1.0}
        for latency, seconds in ((0.0, 0.3), (0.05, 0.52))
    ]
    table = list(format_table(lines))
    assert table[2:4] == ["| 10 | 0 | 0.30 | 0.30 | 0.40 | 1 |", "| 10 | 50 | 0.52 | 0.50 | 0.40 | 1 |"]
    assert table[-1].endswith("0.40 ms at most, reached.")  # 8 ms for ten messages and ten answers
