"""Groups of clients at work: in this process one after another, or spread over worker processes.

A group is a chunk of a fleet, or the part of it that is asked. Whoever asks may put more groups at the end of the row
while answers come.
"""

from __future__ import annotations

import logging
import selectors
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, final

import torch

from grpo_fed.engines.workers.fork_server import Worker
from grpo_fed.engines.workers.frames import receive, send
from grpo_fed.engines.workers.handler import ClientFactory, RequestHandler, Serve, describe_exception
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.runs.records import Failure

LONGEST = 3600.0
"""Seconds at a time: the system does not wait for months."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Clients of one chunk that are asked together."""

    chunk: tuple[str, ...]
    names: tuple[str, ...]
    last: bool = False
    """Whether they wait until all others have been asked, since one of them may hang."""


JobResult: TypeAlias = Mapping[str, Answer] | Failure | None
"""What each answered, or what became of the group, or None: time was up before it was asked."""


class Executor(Protocol):
    """Whoever does the work."""

    def serve(
        self, row: deque[Job], told: Mapping[str, Instruction], until: float | None
    ) -> Iterator[tuple[Job, JobResult]]:
        """All groups of the row, as they are done; `until` is on the monotonic clock."""

    def close(self) -> None:
        """Stop."""


@final
class InProcessExecutor:
    """The process itself. Whoever hangs or ends it does so for all."""

    def __init__(self, serve: Serve) -> None:
        self._desk = RequestHandler(serve)

    def serve(
        self, row: deque[Job], told: Mapping[str, Instruction], until: float | None
    ) -> Iterator[tuple[Job, JobResult]]:
        while row:
            group = row.popleft()
            if _is_over(until):
                yield group, None
            else:
                yield group, self._answer(group, {name: told[name] for name in group.names})

    def _answer(self, group: Job, told: Mapping[str, Instruction]) -> JobResult:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the matrices are small: more of them only wait for each other
        try:
            return self._desk.answer(group.chunk, told)
        except Exception as error:
            log.info("%s", group.names, exc_info=error)
            return Failure("raised", describe_exception(error))
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        self._desk.close()


@final
class WorkerPool:
    """Some processes. A chunk stays with the one that has had it, unless that has fallen behind."""

    def __init__(self, count: int, recipe: ClientFactory) -> None:
        self._recipe = recipe
        self._count = count
        self._idle: list[Worker] = []
        self._busy: dict[Worker, Job] = {}
        self._worker_of_chunk: dict[tuple[str, ...], Worker] = {}

    def serve(
        self, row: deque[Job], told: Mapping[str, Instruction], until: float | None
    ) -> Iterator[tuple[Job, JobResult]]:
        try:
            while row or self._busy:
                while row and len(self._busy) < self._count and not _is_over(until):
                    self._ask(self._idle.pop() if self._idle else Worker(), row, told, until)
                answered = self._wait(until)
                if not answered:
                    yield from self._cancel_rest(row)
                for worker in answered:
                    yield self._busy[worker], self._receive(worker, until)
        finally:  # nobody waits for these answers any more
            for worker in list(self._busy):
                self._kill(worker)

    def close(self) -> None:
        while self._idle:
            self._kill(self._idle[-1])

    def _ask(self, worker: Worker, row: deque[Job], told: Mapping[str, Instruction], until: float | None) -> None:
        """Give it a group from the row; one that has ended while it had nothing to do is replaced."""
        group = self._take(worker, row)
        question = {
            "path": sys.path,
            "serve": self._recipe.serve,
            "given": self._recipe.given,
            "chunk": group.chunk,
            "told": {name: told[name] for name in group.names},
        }
        try:
            send(worker.link, question, until)
        except TimeoutError:
            pass  # it is late like any other
        except OSError:
            self._kill(worker)
            worker = Worker()
            send(worker.link, question, until)
        self._busy[worker] = group
        self._worker_of_chunk[group.chunk] = worker

    def _take(self, worker: Worker, row: deque[Job]) -> Job:
        """The next for it: what it has had before, what nobody has had, what another one has not come to."""

        def rank(place: int) -> tuple[bool, int, int]:
            home = self._worker_of_chunk.get(row[place].chunk)
            return row[place].last, 0 if home is worker else 1 if home is None else 2, place

        place = min(range(len(row)), key=rank)
        group = row[place]
        del row[place]
        return group

    def _wait(self, until: float | None) -> list[Worker]:
        """Those that have answered, or died; none of them when time is up."""
        if not self._busy:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in self._busy:
                selector.register(worker.link, selectors.EVENT_READ, worker)
            while True:
                ready = selector.select(LONGEST if until is None else min(LONGEST, max(0.0, until - time.monotonic())))
                if ready or _is_over(until):
                    return [key.data for key, _ in ready]

    def _receive(self, worker: Worker, until: float | None) -> JobResult:
        """Its answer."""
        group = self._busy[worker]
        try:
            found = receive(worker.link, until)
        except TimeoutError:
            self._kill(worker)
            return Failure("late", "it stopped in the middle of its answer")
        except (EOFError, OSError):
            return Failure("died", self._kill(worker))
        del self._busy[worker]
        self._idle.append(worker)
        if "raised" in found:
            log.info("%s\n%s", group.names, found["trace"])
            return Failure("raised", found["raised"])
        answers: Mapping[str, Answer] = found["answers"]
        return answers

    def _cancel_rest(self, row: deque[Job]) -> Iterator[tuple[Job, JobResult]]:
        """Time is up: who works still may hang for ever."""
        for worker, group in list(self._busy.items()):
            self._kill(worker)
            yield group, Failure("late", "it was still at work, and its process was stopped")
        while row:
            yield row.popleft(), None

    def _kill(self, worker: Worker) -> str:
        """How it ended."""
        self._busy.pop(worker, None)
        self._idle = [one for one in self._idle if one is not worker]
        self._worker_of_chunk = {chunk: one for chunk, one in self._worker_of_chunk.items() if one is not worker}
        return worker.close()


def _is_over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until
