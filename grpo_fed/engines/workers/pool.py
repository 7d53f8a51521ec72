"""Runs jobs: in this process one after another, or spread over worker processes.

A job asks clients of one chunk together. While the results come, the caller may append more jobs to those that wait.
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

from grpo_fed.engines.threads import one_thread
from grpo_fed.engines.workers.fork_server import Worker
from grpo_fed.engines.workers.frames import make_request, receive, send
from grpo_fed.engines.workers.handler import ClientFactory, MakeClients, RequestHandler
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.importing import describe_exception

MAX_SELECT_SECONDS = 3600.0
"""The longest single wait for a reply: the system call does not accept months. It is repeated until the deadline."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Clients of one chunk that are asked together."""

    chunk: tuple[str, ...]
    """All clients of the chunk; they share a process, and environments that stay open between jobs."""
    names: tuple[str, ...]
    """The clients that are asked."""
    last: bool = False
    """Whether the job runs after all others, since a client of it may hang."""


JobResult: TypeAlias = Mapping[str, Answer] | Failure | None
"""Each client's answer, or why the job failed, or None if the deadline passed before it began."""


class Executor(Protocol):
    """Runs jobs."""

    def run_jobs(
        self, jobs: deque[Job], instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[Job, JobResult]]:
        """Run all jobs, and yield each with its result as soon as it is done.

        jobs: emptied as jobs begin; the caller may append more while results come.
        instructions: what each client is asked, by its name.
        deadline: on the monotonic clock; None for no deadline.
        """

    def close(self) -> None:
        """Stop the processes and close the environments."""


@final
class InProcessExecutor:
    """Runs jobs in this process. A client that hangs or ends its process does so for the whole run."""

    def __init__(self, make_clients: MakeClients) -> None:
        self._handler = RequestHandler(make_clients)

    def run_jobs(
        self, jobs: deque[Job], instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[Job, JobResult]]:
        """Run the jobs one after another, each only when its result is asked for."""
        while jobs:
            job = jobs.popleft()
            if _has_passed(deadline):
                yield job, None
            else:
                yield job, self._run(job, {name: instructions[name] for name in job.names})

    def _run(self, job: Job, instructions: Mapping[str, Instruction]) -> JobResult:
        try:
            with one_thread():
                return self._handler.answer(job.chunk, instructions)
        except Exception as error:
            log.info("%s", job.names, exc_info=error)
            return Failure("raised", describe_exception(error))

    def close(self) -> None:
        """Close the clients."""
        self._handler.close()


@final
class WorkerPool:
    """Runs jobs in worker processes.

    A chunk stays with the worker that ran it last, whose environments and learners are ready for it, unless another
    worker is free while that one is busy.
    """

    def __init__(self, size: int, factory: ClientFactory) -> None:
        """Make a pool; workers are started when there is a job for them.

        size: the most workers at a time.
        factory: how workers make the clients of a chunk.
        """
        self._size = size
        self._factory = factory
        self._idle: list[Worker] = []
        self._busy: dict[Worker, Job] = {}
        self._worker_of_chunk: dict[tuple[str, ...], Worker] = {}

    def run_jobs(
        self, jobs: deque[Job], instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[Job, JobResult]]:
        """Run as many jobs at a time as there are workers; a worker that has not answered by the deadline is killed."""
        try:
            while jobs or self._busy:
                while jobs and len(self._busy) < self._size and not _has_passed(deadline):
                    self._begin(self._idle.pop() if self._idle else Worker(), jobs, instructions, deadline)
                ready = self._wait(deadline)
                if not ready:
                    yield from self._cancel_rest(jobs)
                for worker in ready:
                    yield self._busy[worker], self._receive(worker, deadline)
        finally:  # the caller may have stopped listening: these answers are of no use any more
            for worker in list(self._busy):
                self._kill(worker)

    def close(self) -> None:
        """Kill all workers."""
        while self._idle:
            self._kill(self._idle[-1])

    def _begin(
        self, worker: Worker, jobs: deque[Job], instructions: Mapping[str, Instruction], deadline: float | None
    ) -> None:
        """Send a worker one of the jobs; a worker that has died while it was idle is replaced."""
        job = self._take_job(worker, jobs)
        request = make_request(
            sys.path,
            self._factory.function,
            self._factory.settings,
            job.chunk,
            {name: instructions[name] for name in job.names},
        )
        try:
            send(worker.link, request, deadline)
        except TimeoutError:
            pass  # counts as late, like a worker that does not answer
        except OSError:
            self._kill(worker)
            worker = Worker()
            send(worker.link, request, deadline)
        self._busy[worker] = job
        self._worker_of_chunk[job.chunk] = worker

    def _take_job(self, worker: Worker, jobs: deque[Job]) -> Job:
        """Remove the best job for a worker: of a chunk that it ran last, else a new chunk, else another worker's."""

        def rank(index: int) -> tuple[bool, int, int]:
            last_worker = self._worker_of_chunk.get(jobs[index].chunk)
            return jobs[index].last, 0 if last_worker is worker else 1 if last_worker is None else 2, index

        index = min(range(len(jobs)), key=rank)
        job = jobs[index]
        del jobs[index]
        return job

    def _wait(self, deadline: float | None) -> list[Worker]:
        """Wait for workers that have answered or died; there are none if the deadline passes first."""
        if not self._busy:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in self._busy:
                selector.register(worker.link, selectors.EVENT_READ, worker)
            while True:
                seconds = MAX_SELECT_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
                ready = selector.select(min(MAX_SELECT_SECONDS, seconds))
                if ready or _has_passed(deadline):
                    return [key.data for key, _ in ready]

    def _receive(self, worker: Worker, deadline: float | None) -> JobResult:
        """Read a worker's reply, and let it be idle again."""
        job = self._busy[worker]
        try:
            reply = receive(worker.link, deadline)
        except TimeoutError:
            self._kill(worker)
            return Failure("late", "its answer was not complete by the deadline")
        except (EOFError, OSError):
            return Failure("died", self._kill(worker))
        del self._busy[worker]
        self._idle.append(worker)
        if "raised" in reply:
            log.info("%s\n%s", job.names, reply["trace"])
            return Failure("raised", reply["raised"])
        answers: Mapping[str, Answer] = reply["answers"]
        return answers

    def _cancel_rest(self, jobs: deque[Job]) -> Iterator[tuple[Job, JobResult]]:
        """End all jobs because the deadline has passed: a worker that is still busy may hang for ever."""
        for worker, job in list(self._busy.items()):
            self._kill(worker)
            yield job, Failure("late", "it had not answered by the deadline, and its process was stopped")
        while jobs:
            yield jobs.popleft(), None

    def _kill(self, worker: Worker) -> str:
        """Kill a worker, and say how its process ended."""
        self._busy.pop(worker, None)
        self._idle = [idle for idle in self._idle if idle is not worker]
        self._worker_of_chunk = {chunk: last for chunk, last in self._worker_of_chunk.items() if last is not worker}
        return worker.close()


def _has_passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
