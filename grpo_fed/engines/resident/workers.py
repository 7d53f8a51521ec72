"""A client's worker processes: one for each run, which stays between its messages.

A worker keeps torch, the environments and a GPU's context in memory, so that a message costs what its work costs. It
does one message at a time, and those of a run in the order in which they came. A message that is given up takes its
worker with it, since that may hang for ever; the next message gets a new one.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import numpy as np

from grpo_fed.engines.workers.fork_server import Worker, is_possible
from grpo_fed.engines.workers.frames import make_request, receive, send

FACTORY = "grpo_fed.engines.flower.node:make_node_handler"
"""Makes what answers in a worker."""
IDLE_SECONDS = 600.0
"""Seconds after which an idle worker is ended, to free its memory."""


@dataclass(frozen=True)
class ReceivedMessage:
    """A message to a client, without what a link needs for the reply."""

    id: str
    run: int
    kind: str
    scenario: str
    """The run's scenario, as TOML."""
    content: np.ndarray
    """[n] uint8: the packed records."""


@dataclass(frozen=True)
class Outcome:
    """What became of a message: one of the two is there."""

    content: np.ndarray | None = None
    """[n] uint8: the packed records of the answer."""
    raised: str = ""
    """What the client raised, in one line."""
    died: str = ""
    """How the client's process ended."""


Report: TypeAlias = Callable[[ReceivedMessage, Outcome], None]
"""Gets what became of each message that was not cancelled, in the message's own thread."""


@dataclass(eq=False)
class _Job:
    message: ReceivedMessage
    before: threading.Event | None
    """Set when the run's message before this one is done."""
    worker: Worker | None = None
    is_cancelled: bool = False
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _IdleWorker:
    run: int
    worker: Worker
    since: float

    @property
    def is_alive(self) -> bool:
        """Whether the worker is there: an idle worker sends nothing, so that its socket is ready only at its end."""
        return not select.select([self.worker.link], [], [], 0)[0]


@final
class ClientWorkers:
    """Answers a client's tasks in worker processes; on a system without them, in this process."""

    def __init__(self, config: Mapping[str, Any], report: Report) -> None:
        """config: the node's configuration, which names its client."""
        self._config, self._report = dict(config), report
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        """By the message's id."""
        self._idle: _IdleWorker | None = None
        self._handler: Any = None
        self._handling = threading.Lock()

    @property
    def busy(self) -> list[str]:
        """The ids of the tasks that are not done."""
        with self._lock:
            return list(self._jobs)

    def begin(self, message: ReceivedMessage) -> None:
        """Begin a message, unless it was begun already, after the run's others."""
        with self._lock:
            if message.id in self._jobs:
                return
            earlier = [job for job in self._jobs.values() if job.message.run == message.run and not job.is_cancelled]
            job = self._jobs[message.id] = _Job(message, earlier[-1].done if earlier else None)
        threading.Thread(target=self._do, args=(job,), name=f"message-{message.id[:8]}", daemon=True).start()

    def cancel(self, message_id: str) -> None:
        """Give a message up, and end its worker."""
        with self._lock:
            job = self._jobs.pop(message_id, None)
            if job is None:
                return
            job.is_cancelled = True
            if job.worker is not None:
                with suppress(OSError):
                    job.worker.link.shutdown(socket.SHUT_RDWR)

    def cancel_run(self, run: int) -> None:
        """Give all tasks of a run up."""
        with self._lock:
            ids = [message_id for message_id, job in self._jobs.items() if job.message.run == run]
        for message_id in ids:
            self.cancel(message_id)

    def end_idle(self) -> None:
        """End the worker if it has been idle for long."""
        with self._lock:
            idle = self._idle
            if idle is None or time.monotonic() < idle.since + IDLE_SECONDS:
                return
            self._idle = None
        idle.worker.close()

    def close(self) -> None:
        """End all workers; tasks that are not done are given up."""
        for message_id in self.busy:
            self.cancel(message_id)
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None:
            idle.worker.close()

    def _do(self, job: _Job) -> None:
        """Do a message, and report what became of it."""
        if job.before is not None:
            job.before.wait()
        try:
            outcome = self._ask_worker(job) if is_possible() else self._answer_here(job.message)
        except Exception as error:  # noqa: BLE001, whatever it is, the server has to know
            outcome = Outcome(died=f"{type(error).__name__}: {error}")
        finally:
            job.done.set()
        with self._lock:
            wanted = self._jobs.get(job.message.id) is job
        if wanted:
            self._report(job.message, outcome)
        with self._lock:
            if self._jobs.get(job.message.id) is job:
                del self._jobs[job.message.id]

    def _ask_worker(self, job: _Job) -> Outcome:
        """Let a worker do the message: the run's own, or a new one."""
        worker = self._take_worker(job)
        if worker is None:
            return Outcome(died="it was given up")
        reply: Mapping[str, Any] | None = None
        with suppress(EOFError, OSError):
            send(worker.link, self._make_request(job.message))
            reply = receive(worker.link)
        with self._lock:
            job.worker = None
            stays = reply is not None and not job.is_cancelled and self._idle is None
            if stays:
                self._idle = _IdleWorker(job.message.run, worker, time.monotonic())
        how = "" if stays else worker.close()
        return Outcome(died=how) if reply is None else _read(reply)

    def _take_worker(self, job: _Job) -> Worker | None:
        """Take the idle worker if it is the run's, or fork one; None if the message was cancelled."""
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None and not (idle.run == job.message.run and idle.is_alive):
            idle.worker.close()
            idle = None
        worker = Worker() if idle is None else idle.worker
        with self._lock:
            if not job.is_cancelled:
                job.worker = worker
                return worker
        worker.close()
        return None

    def _make_request(self, message: ReceivedMessage) -> dict[str, Any]:
        """Make the request to a worker."""
        request = {
            "kind": message.kind,
            "content": message.content,
            "scenario": message.scenario,
            "config": self._config,
            "threads": read_thread_count(),
        }
        return make_request(sys.path, FACTORY, None, ("node",), {"node": request})

    def _answer_here(self, message: ReceivedMessage) -> Outcome:
        """Let the client answer in this process, one message at a time."""
        from grpo_fed.engines.workers.handler import RequestHandler

        with self._handling:
            if self._handler is None:
                self._handler = RequestHandler()
            return _read(self._handler.reply(self._make_request(message)))


def read_thread_count() -> int:
    """Return the number of threads that a client may use, from the environment."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(threads)) if threads.isdecimal() else 1


def _read(reply: Mapping[str, Any]) -> Outcome:
    """Read what a worker has replied."""
    if "raised" in reply:
        print(reply["trace"], file=sys.stderr, flush=True)
        return Outcome(raised=reply["raised"])
    return Outcome(content=reply["answers"]["node"]["content"])
