"""Flower's grid without Flower's processes: the clients of a scenario on this machine's worker processes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, final

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from grpo_fed.engines.local.schedule import ChunkSchedule, make_chunks
from grpo_fed.engines.wire import HELLO, Codec, Hello, InvalidMessageError, write_hello
from grpo_fed.engines.wire.message_factory import RUN, make_message
from grpo_fed.engines.workers import fork_server as worker
from grpo_fed.engines.workers.handler import ClientFactory, clients_factory
from grpo_fed.engines.workers.pool import Executor, InProcessExecutor, WorkerPool
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.stacked_learner import CHUNK
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import group_by_policy_shape
from grpo_fed.tasks.task import Task

CODES = {"raised": 2, "late": 4, "died": 8}
"""Flower's numbers of errors."""


@final
class LocalGrid(Grid):
    """A grid whose nodes are the clients of a scenario, 1 to K in its order."""

    streams = True
    """`send_and_receive` answers in the order of the messages, as soon as it can."""

    def __init__(
        self,
        scenario: Scenario,
        commons: SharedBlocks,
        home: StateStore,
        workers: int | None = None,
        apart: Iterable[Sequence[str]] = (),
    ) -> None:
        """So many worker processes, 0 for none: then a client that hangs or dies takes all with it.

        By default there is one for every core, on a GPU one; on systems other than Linux, or where a worker could not
        know the clients' environments, none. How clients are cut into chunks follows from their number, and so do the
        last bits of what they learn. `apart` is where another grid's `Rota` was.
        """
        fleets = group_by_policy_shape(scenario)
        tasks = {task.client: task for fleet in fleets for task in fleet}
        recipe = _recipe(scenario, home, list(tasks.values()), workers)
        on_gpu = resolve_device(scenario.device).type == "cuda"
        cores = 1 if on_gpu else len(os.sched_getaffinity(0))
        count = 0 if recipe is None else workers or min(cores, len(tasks))
        chunks = make_chunks(
            [[task.client for task in fleet] for fleet in fleets], count, len(tasks) if on_gpu else CHUNK
        )
        hands: Executor
        if recipe is None:
            hands = InProcessExecutor(lambda names: Clients(scenario, commons, [tasks[name] for name in names], home))
        else:
            hands = WorkerPool(min(count, len(chunks)), recipe)
        self._open(Codec(commons, scenario), commons.clients, ChunkSchedule(chunks, apart), hands, count)

    @classmethod
    def serving(
        cls,
        scenario: Scenario,
        commons: SharedBlocks,
        serve: str,
        workers: int = 0,
        given: Mapping[str, Any] | None = None,
    ) -> Self:
        """With clients of any other kind: `serve`, `module:function`, makes those of a chunk from their names.

        It gets `given`, JSON, after them if there is something.
        """
        recipe = ClientFactory(serve, given)
        chunks = make_chunks([commons.clients], workers)
        hands: Executor = WorkerPool(min(workers, len(chunks)), recipe) if workers else InProcessExecutor(recipe)
        grid = cls.__new__(cls)
        grid._open(Codec(commons, scenario), commons.clients, ChunkSchedule(chunks), hands, workers)
        return grid

    def _open(self, wire: Codec, names: Sequence[str], rota: ChunkSchedule, hands: Executor, workers: int) -> None:
        self.nodes: dict[int, str] = dict(enumerate(names, 1))
        """The clients' names."""
        self.workers = workers
        """How many processes the chunks are cut for."""
        self.schedule = rota
        """Who is asked with whom."""
        self._codec = wire
        self._executor = hands
        self._pushed: dict[str, Message] = {}
        self._run = Run.create_empty(RUN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; close environments."""
        self._executor.close()

    # What Flower's grids do

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Where `Message(...)` alone needs a process that Flower has started."""
        return make_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """They are answered when they are pulled."""
        pushed = {message.metadata.message_id: message for message in messages}
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = (self._pushed.pop(one, None) for one in message_ids)
        return list(self.send_and_receive([message for message in found if message is not None]))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies in the order of the messages, each as soon as those before it are there.

        Whoever has not answered within `timeout` seconds, or the shortest time that a message may live, is late: its
        reply has an error, too.
        """
        waiting = deque(messages)
        lives = [message.metadata.ttl for message in waiting]
        limits = [*lives, *(() if timeout is None else (timeout,))]
        until = time.monotonic() + min(limits) if limits else None
        known: dict[str, Message] = {}
        for reply in self._replies(list(waiting), until):
            known[reply.metadata.reply_to_message_id] = reply
            while waiting and waiting[0].metadata.message_id in known:
                yield known.pop(waiting.popleft().metadata.message_id)

    # How they are answered

    def _replies(self, messages: Sequence[Message], until: float | None) -> Iterator[Message]:
        """In any order."""
        by_kind: dict[str, dict[str, Message]] = {}
        told: dict[str, Instruction] = {}
        for message in messages:
            name, kind = self.nodes[message.metadata.dst_node_id], message.metadata.message_type
            if kind == HELLO:
                yield Message(write_hello(Hello(name)), reply_to=message)
                continue
            asked = by_kind.setdefault(kind, {})
            assert name not in asked, f"{name} gets one message at a time"
            try:
                told[message.metadata.message_id] = self._codec.read_instruction(kind, message.content)
            except InvalidMessageError as error:
                yield _error(message, Failure("raised", f"{type(error).__name__}: {error}"))
                continue
            asked[name] = message
        for asked in by_kind.values():
            instructions = {name: told[message.metadata.message_id] for name, message in asked.items()}
            for name, answer in self._answers(instructions, until):
                yield self._reply(asked[name], instructions[name], answer)

    def _answers(
        self, instructions: Mapping[str, Instruction], until: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        """Of instructions of one kind; where a group fails, its clients are asked again, each alone."""
        row = self.schedule.jobs(instructions)
        for group, outcome in self._executor.serve(row, instructions, until):
            if isinstance(outcome, Failure):
                if outcome.kind != "late" and len(group.names) > 1:
                    row.extend(self.schedule.one_by_one(group))
                    continue
                self.schedule.failed(group)
            elif outcome is not None:
                self.schedule.answered(group)
            for name in group.names:
                if isinstance(outcome, Failure):
                    yield name, outcome
                elif outcome is None:
                    yield name, Failure("late", "its turn did not come in time")
                else:
                    yield name, outcome.get(name, Failure("raised", "it gave no answer"))

    def _reply(self, message: Message, instruction: Instruction, answer: Answer | Failure) -> Message:
        if isinstance(answer, Failure):
            return _error(message, answer)
        return Message(self._codec.write_answer(instruction, answer), reply_to=message)


def _recipe(scenario: Scenario, home: StateStore, tasks: Sequence[Task], workers: int | None) -> ClientFactory | None:
    """For worker processes, if there are to be any; ValueError if they are wanted and cannot be."""
    try:
        if workers == 0:
            return None
        if not worker.is_possible():
            raise ValueError(f"workers = {workers}: worker processes need Linux; workers = 0 would be right")
        return clients_factory(scenario, home, tasks)
    except ValueError:
        if workers is None:
            return None
        raise


def _error(message: Message, failure: Failure) -> Message:
    return Message(Error(CODES[failure.kind], failure.reason), reply_to=message)
