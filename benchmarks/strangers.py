"""What a stranger costs a SuperLink: `python -m benchmarks.strangers` throws 800 MB and many connections at one.

A server of `grpo-fed deploy server`, with TLS and keys, is started on this machine. Strangers without a key send it
long bodies, with and without a declared length, heads without an end, and connections without a word. What is printed:
the memory of the SuperLink before, at its peak and after, and how each attempt was answered.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import ssl
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.learning import describe_machine
from grpo_fed.engines.deploy import commands
from grpo_fed.engines.flower.processes import SupervisedProcesses
from grpo_fed.engines.flower.superlink import SUPERLINK, Identity, SuperLink, find_free_port, make_flower_environment

FILE = Path(__file__).parent / "results" / "strangers.jsonl"
MEGABYTE = 10**6
PATH = b"/v1/fleet/pull-messages"


def main() -> None:
    """Start a server, attack it, and print and save what that did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--connections", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long a stranger keeps on")
    parser.add_argument("--label", default="with limits", help="the name of the line in the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options.megabytes, options.connections, options.seconds)
    results = [line for line in read_results() if line["label"] != options.label]
    FILE.write_text("".join(f"{json.dumps(line)}\n" for line in (*results, {"label": options.label, **result})))
    print("\n".join(format_table([{"label": options.label, **result}])))


def measure(folder: Path, megabytes: int, connections: int, seconds: float) -> dict[str, object]:
    """Attack a server in a folder."""
    commands.init(folder, [], ["ant"])
    server = folder / "server"
    identity = Identity(server / "ca.pem", server / "server.pem", server / "server-key.pem")
    (folder / "data").mkdir()
    environment = make_flower_environment(folder / "home")
    with SupervisedProcesses(folder / "data", environment, folder / "data") as processes:
        superlink = SuperLink(processes, folder / "data", find_free_port(), identity=identity)
        superlink.start()
        pid = processes.pid(SUPERLINK)
        assert pid is not None
        stranger = Stranger(superlink.port, identity.authority, seconds)
        time.sleep(3)
        before, peak, stopping = read_memory(pid), [0.0], threading.Event()

        def watch() -> None:
            while not stopping.wait(0.02):
                peak[0] = max(peak[0], read_memory(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        answers: dict[str, dict[str, int]] = {}
        each = megabytes * MEGABYTE // 8
        for kind, attack, times in (
            ("declared", lambda: stranger.send_body(each, declared=True), 8),
            ("in chunks", lambda: stranger.send_body(each, declared=False), 8),
            ("100 GB declared", lambda: stranger.send_body(100 * 10**9, declared=True), 8),
            ("head without an end", lambda: stranger.send_head(each), 8),
            ("silent", stranger.say_nothing, connections),
        ):
            with ThreadPoolExecutor(times) as executor:
                answers[kind] = dict(Counter(executor.map(lambda call: call(), [attack] * times)))
        time.sleep(1)
        stopping.set()
        watcher.join()
        return {
            "machine": describe_machine(),
            "thrown_mb": megabytes,
            "let_in_mb": round(stranger.sent / MEGABYTE, 1),
            "memory_before_mb": before,
            "memory_peak_mb": peak[0],
            "memory_after_mb": read_memory(pid),
            "answers": answers,
        }


def read_results() -> list[dict[str, Any]]:
    """Read the lines of all measurements."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def format_table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write the table: memory of the SuperLink, and how the attempts were answered."""
    if not results:
        return
    kinds = list(results[0]["answers"])
    yield "|".join(["| ", " MB before ", " at its peak ", " after ", *(f" {kind} " for kind in kinds), ""])
    yield "|".join(["| --- ", *[" --- "] * (3 + len(kinds)), ""])
    for line in results:
        memory = [f" {line[f'memory_{when}_mb']:.0f} " for when in ("before", "peak", "after")]
        answers = [", ".join(f"{count} {what}" for what, count in line["answers"][kind].items()) for kind in kinds]
        yield "|".join([f"| {line['label']} ", *memory, *(f" {text} " for text in answers), ""])


class Stranger:
    """Somebody who reaches the port and has no key."""

    def __init__(self, port: int, authority: Path, seconds: float) -> None:
        self._port, self._seconds = port, seconds
        self._tls = ssl.create_default_context(cafile=str(authority))
        self._lock, self.sent = threading.Lock(), 0

    def send_body(self, size: int, declared: bool) -> str:
        """Send a long body until all of it is sent, or refused; say how it was answered."""
        length = b"content-length: %d" % size if declared else b"transfer-encoding: chunked"
        head = b"POST %s HTTP/1.1\r\nhost: here\r\ncontent-type: application/protobuf\r\n%s\r\n\r\n" % (PATH, length)
        block = bytes(64 * 1024)
        part = block if declared else b"%x\r\n%s\r\n" % (len(block), block)
        return self._attack(head, part, size // len(block))

    def send_head(self, size: int) -> str:
        """Send headers until they are refused."""
        part = b"x: " + b"y" * 1000 + b"\r\n"
        return self._attack(b"POST %s HTTP/1.1\r\n" % PATH, part, size // len(part))

    def say_nothing(self) -> str:
        """Connect and send nothing."""
        return self._attack(b"", b"", 0)

    def _attack(self, head: bytes, part: bytes, times: int) -> str:
        began = time.monotonic()
        try:
            link = self._tls.wrap_socket(
                socket.create_connection(("127.0.0.1", self._port), self._seconds), server_hostname="localhost"
            )
        except OSError:
            return "closed"
        with link:
            link.settimeout(self._seconds)
            try:
                self._send(link, head)
                for _ in range(times):
                    self._send(link, part)
                    if time.monotonic() > began + self._seconds:
                        return "taken for as long as it was sent"
            except OSError:
                pass
            return _answer(link.recv)

    def _send(self, link: ssl.SSLSocket, data: bytes) -> None:
        link.sendall(data)
        with self._lock:
            self.sent += len(data)


def _answer(receive: Callable[[int], bytes]) -> str:
    try:
        line = receive(4096)
    except TimeoutError:
        return "kept open"
    except OSError:
        return "closed"
    return f"status {line.split()[1].decode()}" if line else "closed"


def read_memory(pid: int) -> float:
    """Read the resident memory of a process, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE, 1)


if __name__ == "__main__":
    main()
