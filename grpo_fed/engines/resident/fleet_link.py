"""A client's link to any SuperLink: Flower's Fleet API, asked again and again.

The pauses are short while messages come and grow while none do, since a question takes the SuperLink 6 to 9 ms.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import final

from flwr.app import Error, Message

from grpo_fed.engines.resident.run_configs import RunConfigs
from grpo_fed.engines.resident.workers import ClientWorkers, Outcome, ReceivedMessage
from grpo_fed.engines.wire.flower_private import (
    HEARTBEAT,
    NoConnectionError,
    NodeConnection,
    RefusedError,
    RunOverError,
    pack,
    unpack,
)
from grpo_fed.engines.wire.packing import is_packed, unwrap, wrap

SHORTEST_PAUSE, LONGEST_PAUSE, IDLE_PAUSE = 0.02, 0.5, 3.0
"""Seconds between two questions for messages: after an answer, at most, and at most after a long time."""
SHARE = 4.0
"""A pause is at least so many times as long as the question took: a SuperLink that has much to do is asked less."""
IDLE_AFTER = 120.0
"""Seconds without a message after which pauses grow further."""
GHOST_SECONDS = 75.0
"""Seconds for which Flower may refuse a node that was killed: it counts as online for up to a minute."""
RAISED, DIED = 2, 8
"""Flower's error codes."""


class NotYetAcceptedError(NoConnectionError):
    """Flower refuses the node, perhaps only because one that was killed still counts as online."""


@final
class FleetLink:
    """Takes a client's messages from Flower and sends the replies."""

    def __init__(self, connection: NodeConnection, workers: ClientWorkers, configs: RunConfigs) -> None:
        self._connection, self._workers, self._configs = connection, workers, configs
        self._messages: dict[str, Message] = {}
        """By id, the messages without a reply yet."""
        self._pause = SHORTEST_PAUSE
        self._latest = self._heartbeat = time.monotonic()

    def sign_on(self, registers: bool, until: float) -> None:
        """Sign on, unless the node still is; RefusedError if the SuperLink does not accept it.

        registers: whether the node made its key itself. until: when a node that was killed is offline for sure; until
        then the refusal may be due to that, and NotYetAcceptedError is raised instead.
        """
        if self._connection.node:
            with suppress(RefusedError):  # the SuperLink has forgotten it
                self._connection.send_heartbeat()
                return
        if registers:
            with suppress(RefusedError):  # it is registered already, or signing on says what is wrong
                self._connection.register()
        try:
            self._connection.activate()
        except RefusedError as error:
            if time.monotonic() < until:
                raise NotYetAcceptedError(f"not accepted yet, perhaps as it still counts as online: {error}") from None
            raise

    def serve(self) -> float:
        """Begin the messages that are there, and return the seconds to wait before the next question."""
        now = time.monotonic()
        if now > self._heartbeat + HEARTBEAT / 2:
            self._connection.send_heartbeat()
            self._heartbeat = now
        began = time.monotonic()
        if self.pull():
            self._latest = now
        least = min(SHARE * (time.monotonic() - began), IDLE_PAUSE)
        if self._workers.busy:
            return max(LONGEST_PAUSE, least)  # the next message comes after the answer
        longest = LONGEST_PAUSE if now < self._latest + IDLE_AFTER else IDLE_PAUSE
        self._pause = min(2 * self._pause, longest)
        return max(self._pause, least)

    def pull(self) -> bool:
        """Begin a message that Flower has, instead of the run's earlier ones; return whether there was one."""
        try:
            message = self._connection.pull()
        except RunOverError:
            return True
        if message is None:
            return False
        run, message_id = message.metadata.run_id, message.metadata.message_id
        try:
            scenario = self._configs.find_scenario(self._connection, run)
            content = unwrap(message.content) if is_packed(message.content) else pack(message.content)
        except RunOverError:
            return True
        except ValueError as error:
            self._push(Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=message))
            return True
        self._workers.cancel_run(run)
        self._messages[message_id] = message
        self._workers.begin(ReceivedMessage(message_id, run, message.metadata.message_type, scenario, content))
        return True

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the messages that came by this link and have no reply yet."""
        return frozenset(self._messages)

    def has(self, received: ReceivedMessage) -> bool:
        """Return whether a message came by this link."""
        return received.id in self._messages

    def answer(self, received: ReceivedMessage, outcome: Outcome) -> None:
        """Send the reply to a message; NoConnectionError if it has to be tried again."""
        message = self._messages[received.id]
        if outcome.content is None:
            code = DIED if outcome.died else RAISED
            reply = Message(Error(code, outcome.died or outcome.raised), reply_to=message)
        elif is_packed(message.content):
            reply = Message(wrap(outcome.content), reply_to=message)
        else:
            reply = Message(unpack(outcome.content), reply_to=message)
        self._push(reply)
        del self._messages[received.id]

    def _push(self, reply: Message) -> None:
        with suppress(RunOverError):
            self._connection.push(reply)
        self._pause, self._latest = SHORTEST_PAUSE, time.monotonic()
