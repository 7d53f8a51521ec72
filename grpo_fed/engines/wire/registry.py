"""Finds out which node of a grid is which client.

A node is asked for the name of its client, and for the shape of its task, when it is first seen. A node that comes back
under another id is asked again; as long as both ids are connected, the client is the node that gave the name first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from grpo_fed.engines import wire
from grpo_fed.engines.wire import InvalidMessageError
from grpo_fed.engines.wire.grids import CLOCK_ERROR, push, to_failure, to_one_line
from grpo_fed.engines.wire.replies import ReplyLimits, pull_replies
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.toml.text import closest_match, did_you_mean
from grpo_fed.tasks.task import TaskShape

HELLO_LIMITS = ReplyLimits(0, 10_000_000)
"""What a node may say about its client: the sizes of an action may be many."""
HELLO_DEADLINE = 60.0
"""Seconds that a node may take to name its client before it is asked again."""
PAUSE_AFTER_ERROR = 10.0
"""Seconds before a node is asked again that answered with an error."""
PAUSE_AFTER_FALSE_NAME = 60.0
"""Seconds before a node is asked again that named a client for which its key was not made."""

log = logging.getLogger(__name__)


@final
class NodeRegistry:
    """Knows which connected node is which client of a federation."""

    def __init__(
        self,
        grid: Grid,
        clients: Iterable[str],
        nodes: Mapping[int, str] | None = None,
        keys: Mapping[int, str] | None = None,
        welcomes: bool = False,
    ) -> None:
        """clients: the names that the scenario has.

        nodes: the clients' names by node, if they are known; then no node is asked.
        keys: by node, the client for which its key was made; the node is accepted as that client alone.
        welcomes: whether clients that the scenario does not name may ask to join.
        """
        self._grid, self._clients, self._keys, self._welcomes = grid, frozenset(clients), keys, welcomes
        self._refused: dict[str, str] = {}
        """Why clients that asked to join may not, by their names."""
        self._asks = nodes is None
        self._names = dict(nodes or {})
        """By node, the client that it named; in the order in which the nodes answered."""
        self._asked: dict[str, tuple[int, float]] = {}
        """By message id, the node that was asked, and until when its answer counts."""
        self._resting: dict[int, float] = {}
        """Nodes that failed to answer, and until when they are not asked again."""
        self.rejected: dict[int, str] = {}
        """Why a connected node is no client, by the node's id."""
        self.task_shapes: dict[str, TaskShape | None] = {}
        """By client, the shape of its task as its node reported it first."""

    def connected_clients(self) -> dict[str, int]:
        """Return the node of every client that is connected and known, without waiting for answers."""
        connected = dict.fromkeys(self._grid.get_node_ids())
        if self._asks:
            self._read_answers()
            self._ask_new_nodes(connected)
            self._read_answers()
        self.rejected = {node: reason for node, reason in self.rejected.items() if node in connected}
        nodes: dict[str, int] = {}
        for node, name in self._names.items():
            if node not in connected or name not in self._clients:
                continue
            first = nodes.setdefault(name, node)
            if first == node:
                self.rejected.pop(node, None)
            else:
                self._reject(node, f"says that it is {name}, as node {first} does, which came before it")
        return nodes

    def waiting_clients(self) -> dict[str, TaskShape | None]:
        """Return the clients that ask to join, each with the shape of its task as its node reported it."""
        connected = {*self._grid.get_node_ids()} if self._welcomes else set()
        names = {name for node, name in self._names.items() if node in connected}
        return {name: self.task_shapes.get(name) for name in sorted(names - self._clients - self._refused.keys())}

    def admit(self, name: str) -> None:
        """Take a client in that has asked to join."""
        self._clients |= {name}

    def refuse(self, name: str, reason: str) -> None:
        """Refuse a client that has asked to join, for as long as the run goes on."""
        self._refused[name] = reason
        for node, named in self._names.items():
            if named == name:
                self._reject(node, f"is {name}, which may not join: {reason}")

    def _ask_new_nodes(self, connected: Iterable[int]) -> None:
        """Ask the nodes for their names that were not asked yet, or did not answer in time."""
        now = time.monotonic()
        self._asked = {message_id: (node, until) for message_id, (node, until) in self._asked.items() if until > now}
        self._resting = {node: until for node, until in self._resting.items() if until > now}
        settled = {node for node, _ in self._asked.values()} | self._resting.keys() | self._names.keys()
        messages = {
            str(node): Message(RecordDict(), node, wire.HELLO, group_id="hello", ttl=HELLO_DEADLINE + CLOCK_ERROR)
            for node in connected
            if node not in settled
        }
        for node_id, message_id in push(self._grid, messages):
            if message_id is not None:
                self._asked[message_id] = int(node_id), now + HELLO_DEADLINE

    def _read_answers(self) -> None:
        """Read the names that nodes have answered since."""
        if not self._asked:
            return
        for message_id, reply in pull_replies(self._grid, list(self._asked), HELLO_LIMITS):
            node, _ = self._asked.pop(message_id, (None, 0.0))
            if node is not None:
                self._read_answer(node, reply)

    def _read_answer(self, node: int, reply: Message | Failure) -> None:
        """Accept a node as a client, or reject it with a reason."""
        try:
            if isinstance(reply, Failure):
                raise InvalidMessageError(reply.reason)
            if reply.has_error():
                raise InvalidMessageError(to_failure(reply.error).reason)
            hello = wire.read_hello(reply.content)
        except InvalidMessageError as error:
            self._rest(node, f"did not name its client: {to_one_line(str(error))}", PAUSE_AFTER_ERROR)
            return
        name = hello.client
        if self._keys is not None and self._keys.get(node) != name:
            owner = f"its key was made for {self._keys[node]}" if node in self._keys else "its key is not registered"
            self._rest(node, f"says that it is {to_one_line(name)}, but {owner}", PAUSE_AFTER_FALSE_NAME)
            return
        self._names[node] = name
        if name in self._clients or self._welcomes:
            self.task_shapes.setdefault(name, hello.shape)
        if name in self._refused:
            self.refuse(name, self._refused[name])
        elif name not in self._clients and not self._welcomes:
            close = did_you_mean(closest_match(name, self._clients))
            self._reject(node, f"says that it is {to_one_line(name)}, and the scenario has no such client{close}")

    def _rest(self, node: int, reason: str, seconds: float) -> None:
        """Reject a node for now: it is asked again after so many seconds."""
        self._resting[node] = time.monotonic() + seconds
        self._reject(node, reason)

    def _reject(self, node: int, reason: str) -> None:
        if self.rejected.get(node) != reason:
            self.rejected[node] = reason
            log.warning("node %d %s", node, reason)
