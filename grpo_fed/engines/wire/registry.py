"""Whose nodes those of a grid are.

Nodes say it themselves, when they are first seen, and what their tasks are like. A node that comes back under another
id is asked anew; while both ids are there, the one that said so first is the client.
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
from grpo_fed.engines.wire.grids import CLOCKS, failure_of, one_line, push
from grpo_fed.scenario.toml.text import closest_match, did_you_mean
from grpo_fed.tasks.task import TaskShape

HELLO = 60.0
"""Seconds that a node may take to say whose it is, before it is asked again."""
CALM = 10.0
"""Seconds before a node is asked again that failed to say it."""
STUBBORN = 60.0
"""Seconds before a node is asked again that said another's name."""

log = logging.getLogger(__name__)


@final
class NodeRegistry:
    """Which node is which client."""

    def __init__(
        self,
        grid: Grid,
        clients: Iterable[str],
        nodes: Mapping[int, str] | None = None,
        keys: Mapping[int, str] | None = None,
    ) -> None:
        """`nodes` are all clients' names, and nobody is asked. `keys` say for whom the key of each node was made, and
        it is heard under that name alone.
        """
        self._grid, self._clients, self._keys = grid, frozenset(clients), keys
        self._asks = nodes is None
        self._names = dict(nodes or {})
        """Of nodes, in the order in which they said them."""
        self._asked: dict[str, tuple[int, float]] = {}
        """By message: the node, and until when its answer counts."""
        self._resting: dict[int, float] = {}
        """Nodes that failed to answer, and until when they are left alone."""
        self.rejected: dict[int, str] = {}
        """Why a node that is there is no client, by the node's id."""
        self.task_shapes: dict[str, TaskShape | None] = {}
        """By client, what it said of its task when it was heard first."""

    def connected_clients(self) -> dict[str, int]:
        """Those that are there, by the client's name."""
        there = dict.fromkeys(self._grid.get_node_ids())
        if self._asks:
            self._listen()
            self._ask(there)
            self._listen()
        self.rejected = {node: why for node, why in self.rejected.items() if node in there}
        found: dict[str, int] = {}
        for node, name in self._names.items():
            if node not in there or name not in self._clients:
                continue
            first = found.setdefault(name, node)
            if first == node:
                self.rejected.pop(node, None)
            else:
                self._reject(node, f"says that it is {name}, as node {first} does, which came before it")
        return found

    def _ask(self, there: Iterable[int]) -> None:
        """Those that nobody has asked yet, or that have not answered in time."""
        now = time.monotonic()
        self._asked = {one: (node, until) for one, (node, until) in self._asked.items() if until > now}
        self._resting = {node: until for node, until in self._resting.items() if until > now}
        settled = {node for node, _ in self._asked.values()} | self._resting.keys() | self._names.keys()
        strangers = [node for node in there if node not in settled]
        messages = {
            str(node): Message(RecordDict(), node, wire.HELLO, group_id="hello", ttl=HELLO + CLOCKS)
            for node in strangers
        }
        for name, message_id in push(self._grid, messages):
            if message_id is not None:
                self._asked[message_id] = int(name), now + HELLO

    def _listen(self) -> None:
        """Write down who has answered."""
        if not self._asked:
            return
        for reply in self._grid.pull_messages(list(self._asked)):
            node, _ = self._asked.pop(reply.metadata.reply_to_message_id, (None, 0.0))
            if node is None:
                continue
            try:
                if reply.has_error():
                    raise InvalidMessageError(failure_of(reply.error).reason)
                hello = wire.read_hello(reply.content)
            except InvalidMessageError as error:
                self._rest(node, f"did not say whose it is: {one_line(str(error))}")
                continue
            name = hello.client
            if self._keys is not None and self._keys.get(node) != name:
                owner = f"its key was made for {self._keys[node]}" if node in self._keys else "its key is nobody's"
                self._rest(node, f"says that it is {one_line(name)}, but {owner}", STUBBORN)
                continue
            self._names[node] = name
            if name in self._clients:
                self.task_shapes.setdefault(name, hello.shape)
            else:
                close = did_you_mean(closest_match(name, self._clients))
                self._reject(node, f"says that it is {one_line(name)}, and the scenario has no such client{close}")

    def _rest(self, node: int, why: str, seconds: float | None = None) -> None:
        """It is asked again, but not at once."""
        self._resting[node] = time.monotonic() + (CALM if seconds is None else seconds)
        self._reject(node, why)

    def _reject(self, node: int, why: str) -> None:
        if self.rejected.get(node) != why:
            self.rejected[node] = why
            log.warning("node %d %s", node, why)
