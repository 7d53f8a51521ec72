"""What stays warm on a client's machine between two messages: `python -m grpo_fed.engines.hearth SOCKET`.

Flower starts a new process for every message, which would import torch for seconds, make the environments anew and on a
GPU a context, to compute for perhaps less than that. So beside a SuperNode of ours there is this process with a worker
for each client, who stays for the run; what Flower starts only hands its message on, through a socket.

A worker does one message at a time. When the next one comes for its client, nobody waits for the answer to the first
any more, and a worker who is still busy with it may hang for ever: another takes its place. So it is if whoever handed
a message on is gone.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from grpo_fed.engines.frames import receive, send
from grpo_fed.engines.messenger import HEARTH
from grpo_fed.engines.worker import Worker, is_possible, start_ahead

NAME = "hearth"
"""Of the process, and of its socket."""
SERVE = "grpo_fed.engines.node:serving"
"""Makes what answers in a worker."""
COLD = 600.0
"""Seconds after which a worker with nothing to do is let go, with the memory that it has."""
LOOK = 10.0
"""Seconds between two looks for such."""
LONGEST = 100
"""Bytes of a socket's path: systems take little more."""


def known(folder: Path) -> dict[str, str]:
    """For the environment of SuperNodes: where the socket of the one in this folder is, if there can be one."""
    return {HEARTH: str(folder / NAME)} if _is_possible(folder) else {}


def commands(folder: Path) -> dict[str, list[str]]:
    """By its name, what starts it."""
    return {NAME: [sys.executable, "-m", __name__, str(folder / NAME)]} if _is_possible(folder) else {}


def _is_possible(folder: Path) -> bool:
    return is_possible() and len(str(folder / NAME).encode()) <= LONGEST


@dataclass(frozen=True)
class Kept:
    """A worker with nothing to do."""

    run: int
    worker: Worker
    since: float


@final
class Hearth:
    """Workers by client, and those who are busy by client and run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, Kept] = {}
        self._busy: dict[tuple[str, int], Worker] = {}

    def serve(self, link: socket.socket) -> None:
        """One message, which comes through the link, as its answer goes."""
        with link, suppress(EOFError, OSError):
            asked = receive(link)
            client, run = repr(sorted(asked["told"]["config"].items())), int(asked["run"])
            try:
                worker = self._take(client, run)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return
            question = {"path": asked["path"], "serve": SERVE, "given": None, "chunk": (client,)}
            answer = self._ask(worker, {**question, "told": {client: asked["told"]}}, link)
            if answer is None or "died" in answer:
                answer = {"died": self._dismiss(client, run, worker)}
            else:
                self._keep(client, run, worker)
            send(link, answer["answers"][client] if "answers" in answer else answer)

    def let_go(self) -> None:
        """Those with nothing to do for long."""
        with self._lock:
            cold = [client for client, kept in self._idle.items() if time.monotonic() > kept.since + COLD]
            for client in cold:
                self._idle.pop(client).worker.close()

    def _take(self, client: str, run: int) -> Worker:
        """Who has worked for it before in this run, or a new one."""
        with self._lock:
            busy = self._busy.pop((client, run), None)
            if busy is not None:
                with suppress(OSError):
                    busy.link.shutdown(socket.SHUT_RDWR)  # whoever listens to it lets it go then
            kept = self._idle.pop(client, None)
            if kept is not None and kept.run != run:
                kept.worker.close()
                kept = None
            worker = self._busy[client, run] = Worker() if kept is None else kept.worker
            return worker

    def _ask(self, worker: Worker, question: Mapping[str, Any], link: socket.socket) -> dict[str, Any] | None:
        """Its answer; None if it ends before, or nobody waits for it any more."""
        try:
            send(worker.link, question)
            ready, *_ = select.select([worker.link, link], [], [])
            return receive(worker.link) if worker.link in ready else None
        except (EOFError, OSError):
            return None

    def _dismiss(self, client: str, run: int, worker: Worker) -> str:
        """How it ended."""
        with self._lock:
            if self._busy.get((client, run)) is worker:
                del self._busy[client, run]
        return worker.close()

    def _keep(self, client: str, run: int, worker: Worker) -> None:
        with self._lock:
            if self._busy.pop((client, run), None) is worker and client not in self._idle:
                self._idle[client] = Kept(run, worker, time.monotonic())
            else:
                worker.close()


def main() -> None:
    """Serve at the socket that is named, for ever."""
    start_ahead()
    place = Path(sys.argv[1])
    place.unlink(missing_ok=True)
    hearth = Hearth()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(place))
        door.listen()
        door.settimeout(LOOK)
        while True:
            with suppress(TimeoutError):
                link, _ = door.accept()
                link.settimeout(None)
                threading.Thread(target=hearth.serve, args=(link,), daemon=True).start()
            hearth.let_go()


if __name__ == "__main__":
    main()
