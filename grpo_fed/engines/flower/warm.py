"""A process that keeps a client's worker warm between messages: `python -m grpo_fed.engines.flower.warm SOCKET`.

Flower starts a new process for every message. That process would import torch for seconds, make the environments again
and on a GPU a context, for a computation that may take less. So `deploy client` and the engine start a warm server
beside their SuperNodes. It has a worker for each client, which stays for the run; the process that Flower starts only
forwards its message through a socket (forward.py).

A worker does one message at a time. If another message comes for its client and run, the answer to the first is no
longer wanted, and a worker that is still busy with it may hang for ever: a new worker replaces it. A message that is
sent twice is done once. A worker is also ended if every process that waits for its answer is gone.
"""

from __future__ import annotations

import hashlib
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

from grpo_fed.engines.flower.forward import WARM_SOCKET
from grpo_fed.engines.workers.fork_server import Worker, is_possible, preload
from grpo_fed.engines.workers.frames import make_request, receive, send

PROCESS = "warm-server"
"""The name of the process."""
SOCKET = "socket"
"""The name of the socket's file."""
FACTORY = "grpo_fed.engines.flower.node:make_warm_handler"
"""Makes what answers in a worker."""
IDLE_SECONDS = 600.0
"""Seconds after which an idle worker is ended, to free its memory."""
IDLE_CHECK = 10.0
"""Seconds between two looks for such workers."""
WAIT_CHECK = 0.5
"""Seconds between two looks at whether a process still waits for an answer."""
MAX_PATH = 96
"""The most bytes of a socket's path: systems allow little more."""

Key: TypeAlias = tuple[str, int]
"""A client, by its node's configuration, and a run."""


def make_node_environment(folder: Path) -> dict[str, str]:
    """Return the environment variables that tell SuperNodes of the warm server in this folder; none if it cannot be."""
    return {WARM_SOCKET: str(folder / SOCKET)} if _is_possible(folder) else {}


def make_start_commands(folder: Path) -> dict[str, list[str]]:
    """Return the command that starts the warm server in this folder, by the process's name; none if it cannot be."""
    return {PROCESS: [sys.executable, "-P", "-m", __name__, str(folder / SOCKET)]} if _is_possible(folder) else {}


def _is_possible(folder: Path) -> bool:
    return is_possible() and len(str(folder / SOCKET).encode()) <= MAX_PATH


@dataclass(frozen=True)
class IdleWorker:
    """A worker without a message."""

    run: int
    worker: Worker
    since: float

    @property
    def is_alive(self) -> bool:
        """Whether the worker is there: an idle worker sends nothing, so that its socket is ready only at its end."""
        return not select.select([self.worker.link], [], [], 0)[0]


@dataclass(eq=False)
class RunningMessage:
    """A message that a worker is busy with."""

    worker: Worker
    digest: str
    """Identifies the message's content."""
    waiting: int = 1
    """How many processes wait for the answer."""
    cancelled: str = ""
    """Why the answer is no longer wanted; empty as long as it is."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def cancel(self, reason: str) -> None:
        """End the worker; the reason is the answer then."""
        self.cancelled = reason
        with suppress(OSError):
            self.worker.link.shutdown(socket.SHUT_RDWR)


@final
class WarmServer:
    """Hands each message to the worker of its client and run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, IdleWorker] = {}
        """By client."""
        self._running: dict[Key, RunningMessage] = {}

    def serve(self, link: socket.socket) -> None:
        """Receive one message through a socket, and send its answer."""
        with link, suppress(EOFError, OSError):
            forwarded = receive(link)
            request = forwarded["request"]
            key = repr(sorted(request["config"].items())), int(forwarded["run"])
            digest = hashlib.sha256(request["kind"].encode() + request["content"].tobytes()).hexdigest()
            question = make_request(forwarded["path"], FACTORY, None, (key[0],), {key[0]: request})
            try:
                message = self._begin(key, digest, question)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return
            while not message.done.wait(WAIT_CHECK):
                if _is_closed(link):
                    self._leave(message)
                    return
            send(link, message.answer)

    def end_idle(self) -> None:
        """End the workers that have been idle for long."""
        with self._lock:
            now = time.monotonic()
            clients = [client for client, idle in self._idle.items() if now > idle.since + IDLE_SECONDS]
            ended = [self._idle.pop(client) for client in clients]
        for idle in ended:
            idle.worker.close()

    def _begin(self, key: Key, digest: str, question: Mapping[str, Any]) -> RunningMessage:
        """Begin a message with the client's worker, or a new one; if a worker is busy with the very same, join it."""
        client, run = key
        outdated: IdleWorker | None = None
        with self._lock:
            earlier = self._running.get(key)
            if earlier is not None and earlier.digest == digest and not earlier.cancelled:
                earlier.waiting += 1
                return earlier
            if earlier is not None:
                earlier.cancel("the client's next message came before it had answered")
            idle = self._idle.pop(client, None)
            if idle is not None and not (idle.run == run and idle.is_alive):
                outdated, idle = idle, None
            message = self._running[key] = RunningMessage(Worker() if idle is None else idle.worker, digest)
        if outdated is not None:
            outdated.worker.close()
        threading.Thread(target=self._do, args=(key, message, question), daemon=True).start()
        return message

    def _do(self, key: Key, message: RunningMessage, question: Mapping[str, Any]) -> None:
        """Hand a message to its worker, and wait for the answer."""
        client, run = key
        reply: Mapping[str, Any] | None = None
        try:
            with suppress(EOFError, OSError):
                send(message.worker.link, question)
                reply = receive(message.worker.link)
            with self._lock:
                if self._running.get(key) is message:
                    del self._running[key]
                stays = reply is not None and not message.cancelled and client not in self._idle
                if stays:
                    self._idle[client] = IdleWorker(run, message.worker, time.monotonic())
            how = "" if stays else message.worker.close()
            if reply is None:
                message.answer = {"died": message.cancelled or how}
            else:
                message.answer = reply["answers"][client] if "answers" in reply else reply
        finally:  # a process that gets no answer does the work itself
            message.done.set()

    def _leave(self, message: RunningMessage) -> None:
        """Note that a process no longer waits for the answer."""
        with self._lock:
            message.waiting -= 1
            if not message.waiting:
                message.cancel("no process waits for the answer any more")


def _is_closed(link: socket.socket) -> bool:
    """Return whether the other end is closed: it sends nothing more, so that the socket is ready only at its end."""
    ready, *_ = select.select([link], [], [], 0)
    return bool(ready)


def main() -> None:
    """Serve for ever, at the socket that the command line names."""
    preload()
    path, server = Path(sys.argv[1]), WarmServer()
    unready = path.with_suffix(".new")
    unready.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(unready))
        listener.listen()
        unready.rename(path)  # a socket at this path always accepts connections
        listener.settimeout(IDLE_CHECK)
        while True:
            with suppress(TimeoutError):
                link, _ = listener.accept()
                link.settimeout(None)
                threading.Thread(target=server.serve, args=(link,), daemon=True).start()
            server.end_idle()


if __name__ == "__main__":
    main()
