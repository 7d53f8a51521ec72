"""Whose answers come next, for a server that does not wait for all of its clients.

`RealTime` hands the work out and takes answers as they come. `VirtualTime` knows from the clients' paces when each
answer will come, and has the work done only then, so that the run is the same on every machine. `RecordedOrder` repeats
the order of another run.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, final

from grpo_fed.federation.assignments import Assignment
from grpo_fed.federation.messages import Answer, Train
from grpo_fed.federation.transport import Transport
from grpo_fed.runs.merge_order import MergeOrder
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.settings import RoundSettings

Arrived = tuple[str, Answer | Failure]
"""A client, and its answer or why there is none."""
LONGEST_WAIT = 3600.0
"""Seconds of one wait for answers, without a deadline."""


class Arrivals(Protocol):
    """Decides in which order the work that clients were given is done or comes back."""

    def choose(self, merge: int, idle: Sequence[str]) -> Collection[str]:
        """Choose which of the clients without work are given some before a merge."""

    def begin(self, instructions: Mapping[str, Train]) -> None:
        """Hand work over."""

    def wait(
        self, merge: int, work: Mapping[str, Assignment], instructions: Mapping[str, Train], count: int, until: float
    ) -> Iterable[Arrived]:
        """Return answers of a merge that still needs `count` of them: at least one, but none if time is up.

        work: what all clients do at present, with its instructions; it changes as the answers are taken. until: the
        time of `time.monotonic` to wait for.
        """


@final
class RealTime:
    """Clients work at once, and answers come when they come."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def choose(self, merge: int, idle: Sequence[str]) -> Collection[str]:
        """Choose all."""
        return idle

    def begin(self, instructions: Mapping[str, Train]) -> None:
        """Hand work over; what a client did before is given up."""
        self._transport.submit(instructions)

    def wait(
        self, merge: int, work: Mapping[str, Assignment], instructions: Mapping[str, Train], count: int, until: float
    ) -> Iterable[Arrived]:
        """Wait for the next answers, however many come together."""
        return [*self._transport.collect(max(0.0, min(until - time.monotonic(), LONGEST_WAIT)))]


@final
class VirtualTime:
    """Answers come in the order of virtual time, clients with equal times in the order of their names."""

    def __init__(self, transport: Transport, deadline: float | None) -> None:
        """deadline: real seconds for a computation, as for `Transport.send`."""
        self._transport, self._deadline = transport, deadline

    def choose(self, merge: int, idle: Sequence[str]) -> Collection[str]:
        """Choose all."""
        return idle

    def begin(self, instructions: Mapping[str, Train]) -> None:
        """Do nothing yet."""

    def wait(
        self, merge: int, work: Mapping[str, Assignment], instructions: Mapping[str, Train], count: int, until: float
    ) -> Iterable[Arrived]:
        """Have the work done whose time comes next."""
        names = sorted(work, key=lambda name: (work[name].due, name))[:count]
        return self._transport.send({name: instructions[name] for name in names}, self._deadline)


@final
class RecordedOrder:
    """Answers come in the order of another run."""

    def __init__(self, transport: Transport, orders: Mapping[int, MergeOrder], settings: RoundSettings) -> None:
        """orders: by merge. settings: those of the run."""
        self._transport, self._orders, self._settings = transport, orders, settings
        self._instructions: dict[str, Train] = {}
        """By client, the latest work."""
        self._last = 0
        """The merge whose answers were returned last."""
        self._rest: Sequence[tuple[str, int, int]] = ()
        """Its answers that were not returned yet."""

    def choose(self, merge: int, idle: Sequence[str]) -> Collection[str]:
        """Choose those that were given work; ValueError if one of them could not be."""
        told = self._of(merge).told
        if busy := {*told} - {*idle}:
            raise ValueError(f"merge {merge} of the recorded order gives work to {min(busy)}, which has some already")
        return told

    def begin(self, instructions: Mapping[str, Train]) -> None:
        """Remember the work."""
        self._instructions |= instructions

    def wait(
        self, merge: int, work: Mapping[str, Assignment], instructions: Mapping[str, Train], count: int, until: float
    ) -> Iterable[Arrived]:
        """Have the work done that was in this merge; what had failed fails again, after what its client did before."""
        order = self._of(merge)
        if merge != self._last:
            self._last, self._rest = merge, order.came
        elif not self._rest:  # it went on with fewer answers than it could have had
            return
        if self._settings.again == "at-once":
            while self._rest:
                (event, *self._rest) = self._rest
                client = self._check(merge, event, work)
                yield from self._transport.send({client: self._instructions[client]}, None)
        else:
            together = self._take(merge, count)
            clients = [self._check(merge, event, work) for event in together]
            if clients:
                yield from self._transport.send({client: self._instructions[client] for client in clients}, None)
        if not self._rest:
            yield from ((client, Failure(kind, "as it was recorded")) for client, kind in order.failed.items())

    def _take(self, merge: int, count: int) -> Sequence[tuple[str, int, int]]:
        """Take the answers that were computed together: so many, or all if these make the merge."""
        first = self._rest[:count]
        makes_merge = all(merge - 1 - version <= self._settings.max_staleness for _, version, _ in first)
        taken = self._rest if makes_merge else first
        self._rest = self._rest[len(taken) :]
        return taken

    def _check(self, merge: int, event: tuple[str, int, int], work: Mapping[str, Assignment]) -> str:
        """Return the client of an event; ValueError if it has other work."""
        client, version, number = event
        if client not in work or (work[client].version, work[client].number) != (version, number):
            raise ValueError(f"merge {merge} of the recorded order has work of {client} that it was not given")
        return client

    def _of(self, merge: int) -> MergeOrder:
        if merge not in self._orders:
            raise ValueError(f"the recorded order ends before merge {merge}")
        return self._orders[merge]
