"""What stays warm on a client's machine between two messages: `python -m grpo_fed.engines.flower.warm SOCKET`.

Flower starts a new process for every message, which would import torch for seconds, make the environments anew and on a
GPU a context, to compute for perhaps less than that. So beside a SuperNode of ours there is this process with a worker
for each client, who stays for the run; what Flower starts only hands its message on, through a socket.

A worker does one message at a time. When another one comes for its client and run, nobody waits for the answer to the
first any more, and a worker who is still busy with it may hang for ever: a new one takes its place. The same message
told twice is done once. Work that nobody waits for, since whoever handed the message on is gone, is ended.
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
from typing import Any, final

from grpo_fed.engines.flower.forward import WARM_SOCKET
from grpo_fed.engines.workers.fork_server import Worker, is_possible, preload
from grpo_fed.engines.workers.frames import make_request, receive, send

NAME = "hearth"
"""Of the process, and of its socket."""
SERVE = "grpo_fed.engines.flower.node:serving"
"""Makes what answers in a worker."""
COLD = 600.0
"""Seconds after which a worker with nothing to do is let go, with the memory that it has."""
LOOK = 10.0
"""Seconds between two looks for such."""
GLANCE = 0.5
"""Seconds between two looks whether somebody still waits for an answer."""
LONGEST = 96
"""Bytes of a socket's path: systems take little more."""


def worker_environment(folder: Path) -> dict[str, str]:
    """For the environment of SuperNodes: where the socket of the one in this folder is, if there can be one."""
    return {WARM_SOCKET: str(folder / NAME)} if _is_possible(folder) else {}


def start_commands(folder: Path) -> dict[str, list[str]]:
    """By its name, what starts it."""
    return {NAME: [sys.executable, "-P", "-m", __name__, str(folder / NAME)]} if _is_possible(folder) else {}


def _is_possible(folder: Path) -> bool:
    return is_possible() and len(str(folder / NAME).encode()) <= LONGEST


@dataclass(frozen=True)
class IdleWorker:
    """A worker with nothing to do."""

    run: int
    worker: Worker
    since: float

    @property
    def is_there(self) -> bool:
        """Who has nothing to do says nothing, unless by its end."""
        return not select.select([self.worker.link], [], [], 0)[0]


@dataclass(eq=False)
class RunningMessage:
    """A message that a worker is busy with."""

    worker: Worker
    message: str
    """A digest of it."""
    waiting: int = 1
    """How many wait for the answer."""
    ended: str = ""
    """Why nobody wants it any more."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def end(self, why: str) -> None:
        """Let the worker go: its answer is the reason then."""
        self.ended = why
        with suppress(OSError):
            self.worker.link.shutdown(socket.SHUT_RDWR)


@final
class WarmServer:
    """Workers by client, and what they are busy with by client and run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, IdleWorker] = {}
        self._busy: dict[tuple[str, int], RunningMessage] = {}

    def serve(self, link: socket.socket) -> None:
        """One message, which comes through the link, as its answer goes."""
        with link, suppress(EOFError, OSError):
            asked = receive(link)
            told = asked["told"]
            key = repr(sorted(told["config"].items())), int(asked["run"])
            message = hashlib.sha256(told["kind"].encode() + told["content"].tobytes()).hexdigest()
            question = make_request(asked["path"], SERVE, None, (key[0],), {key[0]: told})
            try:
                work = self._begin(key, message, question)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return
            while not work.done.wait(GLANCE):
                if _is_gone(link):
                    self._leave(work)
                    return
            send(link, work.answer)

    def let_go(self) -> None:
        """Those with nothing to do for long."""
        with self._lock:
            cold = [client for client, kept in self._idle.items() if time.monotonic() > kept.since + COLD]
            gone = [self._idle.pop(client) for client in cold]
        for kept in gone:
            kept.worker.close()

    def _begin(self, key: tuple[str, int], message: str, question: Mapping[str, Any]) -> RunningMessage:
        """The same message's work, if somebody is busy with it; or whoever has worked for the client in this run, or a
        new worker, begins.
        """
        client, run = key
        gone: list[IdleWorker] = []
        with self._lock:
            before = self._busy.get(key)
            if before is not None and before.message == message and not before.ended:
                before.waiting += 1
                return before
            if before is not None:
                before.end("the client's next message came before it had answered")
            kept = self._idle.pop(client, None)
            if kept is not None and not (kept.run == run and kept.is_there):
                gone.append(kept)
                kept = None
            work = self._busy[key] = RunningMessage(Worker() if kept is None else kept.worker, message)
        for one in gone:
            one.worker.close()
        threading.Thread(target=self._do, args=(key, work, question), daemon=True).start()
        return work

    def _do(self, key: tuple[str, int], work: RunningMessage, question: Mapping[str, Any]) -> None:
        """Hand the message to its worker, and wait for the answer."""
        client, run = key
        found: Mapping[str, Any] | None = None
        try:
            with suppress(EOFError, OSError):
                send(work.worker.link, question)
                found = receive(work.worker.link)
            with self._lock:
                if self._busy.get(key) is work:
                    del self._busy[key]
                stays = found is not None and not work.ended and client not in self._idle
                if stays:
                    self._idle[client] = IdleWorker(run, work.worker, time.monotonic())
            how = "" if stays else work.worker.close()
            if found is None:
                work.answer = {"died": work.ended or how}
            else:
                work.answer = found["answers"][client] if "answers" in found else found
        finally:  # without an answer whoever waits does the work
            work.done.set()

    def _leave(self, work: RunningMessage) -> None:
        """Whoever waited is gone."""
        with self._lock:
            work.waiting -= 1
            if not work.waiting:
                work.end("nobody waits for it any more")


def _is_gone(link: socket.socket) -> bool:
    """Whether the other end is, who has said all that it has to say."""
    ready, *_ = select.select([link], [], [], 0)
    return bool(ready)


def main() -> None:
    """Serve at the socket that is named, for ever."""
    preload()
    place, hearth = Path(sys.argv[1]), WarmServer()
    unheard = place.with_suffix(".new")
    unheard.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(unheard))
        door.listen()
        unheard.rename(place)  # only now there is somebody to hear
        door.settimeout(LOOK)
        while True:
            with suppress(TimeoutError):
                link, _ = door.accept()
                link.settimeout(None)
                threading.Thread(target=hearth.serve, args=(link,), daemon=True).start()
            hearth.let_go()


if __name__ == "__main__":
    main()
