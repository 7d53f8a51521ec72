"""A Flower grid without Flower's processes: its nodes are the clients of a scenario, on this machine's processes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self, final

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from grpo_fed.engines.local.schedule import ChunkSchedule, make_chunks
from grpo_fed.engines.wire import HELLO, Codec, Hello, InvalidMessageError, write_hello
from grpo_fed.engines.wire.flower_private import RUN, Run, make_message
from grpo_fed.engines.workers.fork_server import is_possible
from grpo_fed.engines.workers.handler import ClientFactory, clients_factory
from grpo_fed.engines.workers.pool import Executor, InProcessExecutor, WorkerPool
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.federation.state_store import StateStore
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.stacked_learner import CHUNK
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.importing import describe_exception

ERROR_CODES = {"raised": 2, "late": 4, "died": 8}
"""Flower's error code for each kind of failure."""


def make_local_grid(
    setup: FederationSetup,
    state_store: StateStore,
    workers: int | None = None,
    set_aside: Iterable[Sequence[str]] = (),
    chunk: int | None = None,
) -> LocalGrid:
    """Make the grid of a scenario's clients.

    workers: the number of worker processes; 0 runs the clients in this process, where one that hangs or dies takes the
    run with it. The default is a worker for every core, or one on a GPU, but none on systems other than Linux or where
    a worker could not import the clients' environments. The number decides how clients are cut into chunks, and with
    that the last bits of what they learn.
    set_aside: the clients that a saved schedule had set aside.
    chunk: the most clients that are computed together; by default what is fastest.
    Raises ValueError if workers are asked for and impossible.
    """
    factory = _worker_factory(setup, state_store, workers)
    on_gpu = resolve_device(setup.scenario.device).type == "cuda"
    cores = 1 if on_gpu else len(os.sched_getaffinity(0))
    count = 0 if factory is None else workers or min(cores, len(setup.clients))
    groups = [[task.client for task in tasks] for tasks in setup.tasks_by_policy]
    chunks = make_chunks(groups, count, chunk or (len(setup.clients) if on_gpu else CHUNK))
    executor: Executor
    if factory is None:
        executor = InProcessExecutor(lambda names: _make_clients(setup, state_store, names))
    else:
        executor = WorkerPool(min(count, len(chunks)), factory)
    codec = Codec(setup.shared_blocks, setup.scenario)
    return LocalGrid(setup.clients, executor, codec, ChunkSchedule(chunks, count, set_aside))


def _worker_factory(setup: FederationSetup, state_store: StateStore, workers: int | None) -> ClientFactory | None:
    """Describe the clients to worker processes; None if there are to be no workers."""
    try:
        if workers == 0:
            return None
        if not is_possible():
            raise ValueError(f"workers = {workers}: worker processes need Linux; use workers = 0")
        return clients_factory(setup, state_store)
    except ValueError:
        if workers is None:
            return None
        raise


def _make_clients(setup: FederationSetup, state_store: StateStore, names: Sequence[str]) -> Clients:
    return Clients(setup.scenario, setup.shared_blocks, [setup.tasks[name] for name in names], state_store)


@final
class LocalGrid(Grid):
    """A Flower grid whose node 1 is the first client, node 2 the second, and so on."""

    streams = True
    """`send_and_receive` yields each reply as soon as it can, in the order of the messages."""

    def __init__(self, clients: Sequence[str], executor: Executor, codec: Codec, schedule: ChunkSchedule) -> None:
        """Make a grid of these clients.

        executor: runs the clients and is closed with the grid.
        codec: reads the messages to the clients and writes their replies.
        schedule: decides which clients are asked together.
        """
        self.nodes: dict[int, str] = dict(enumerate(clients, 1))
        """The clients' names by node id."""
        self.schedule = schedule
        self._executor = executor
        self._codec = codec
        self._pushed: dict[str, Message] = {}
        """Messages by id that have been pushed and not yet pulled."""
        self._run = Run.create_empty(RUN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers and close the environments."""
        self._executor.close()

    # Flower's interface of a grid

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to a node; Flower's own `Message(...)` works only in a process that Flower has started."""
        return make_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """List the ids of all nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages and return their ids; the clients do the work when the replies are pulled."""
        pushed = {message.metadata.message_id: message for message in messages}
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages; an id that is unknown or was pulled before has none."""
        pushed = (self._pushed.pop(message_id, None) for message_id in message_ids)
        return list(self.send_and_receive([message for message in pushed if message is not None]))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the reply to each message in the order of the messages, as soon as those before it have been yielded.

        timeout: seconds; the shortest time to live of a message limits it too. A message that is not answered by then
        gets an error as its reply.
        """
        unanswered = deque(messages)
        limits = [message.metadata.ttl for message in unanswered]
        if timeout is not None:
            limits.append(timeout)
        deadline = time.monotonic() + min(limits) if limits else None
        replies: dict[str, Message] = {}
        for reply in self._replies(list(unanswered), deadline):
            replies[reply.metadata.reply_to_message_id] = reply
            while unanswered and unanswered[0].metadata.message_id in replies:
                yield replies.pop(unanswered.popleft().metadata.message_id)

    # How messages are answered

    def _replies(self, messages: Sequence[Message], deadline: float | None) -> Iterator[Message]:
        """Yield the replies to all messages, in any order; instructions of the same kind are run together."""
        by_kind: dict[str, dict[str, tuple[Message, Instruction]]] = {}
        for message in messages:
            client, kind = self.nodes[message.metadata.dst_node_id], message.metadata.message_type
            if kind == HELLO:
                yield Message(write_hello(Hello(client)), reply_to=message)
                continue
            of_kind = by_kind.setdefault(kind, {})
            assert client not in of_kind, f"{client} gets one message at a time"
            try:
                of_kind[client] = message, self._codec.read_instruction(kind, message.content)
            except InvalidMessageError as error:
                yield _error_reply(message, Failure("raised", describe_exception(error)))
        for of_kind in by_kind.values():
            instructions = {client: instruction for client, (_, instruction) in of_kind.items()}
            for client, answer in self._answers(instructions, deadline):
                yield self._reply(*of_kind[client], answer)

    def _answers(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        """Yield each client's answer to instructions of one kind; if a job fails, each of its clients is asked alone.

        A job that hangs is not asked again: there is no time left for it.
        """
        jobs = self.schedule.jobs(instructions)
        for job, result in self._executor.run_jobs(jobs, instructions, deadline):
            if isinstance(result, Failure):
                if result.kind != "late" and len(job.names) > 1:
                    jobs.extend(self.schedule.one_by_one(job))
                    continue
                self.schedule.failed(job)
            elif result is not None:
                self.schedule.answered(job)
            for client in job.names:
                if isinstance(result, Failure):
                    yield client, result
                elif result is None:
                    yield client, Failure("late", "its turn did not come in time")
                else:
                    yield client, result.get(client, Failure("raised", "it gave no answer"))

    def _reply(self, message: Message, instruction: Instruction, answer: Answer | Failure) -> Message:
        if isinstance(answer, Failure):
            return _error_reply(message, answer)
        return Message(self._codec.write_answer(instruction, answer), reply_to=message)


def _error_reply(message: Message, failure: Failure) -> Message:
    return Message(Error(ERROR_CODES[failure.kind], failure.reason), reply_to=message)
