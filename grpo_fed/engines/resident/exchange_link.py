"""A client's link to a SuperLink with an exchange: one request waits for messages, another one sends an answer.

Messages that went by Flower, from an app that knows no exchange or to a node that was away, are taken from there: the
exchange says when there may be one, and the node looks now and then by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.resident.fleet_link import DIED, RAISED, FleetLink
from grpo_fed.engines.resident.run_configs import RunConfigs
from grpo_fed.engines.resident.workers import ClientWorkers, Outcome, ReceivedMessage
from grpo_fed.engines.wire.flower_private import NodeConnection, RefusedError, RunOverError

UNAUTHORISED = 401
"""The status of a request whose pass is not valid."""
FLOWER_SECONDS = 20.0
"""Seconds between two looks at whether Flower has a message."""


@final
class ExchangeLink:
    """Takes a client's messages from an exchange and sends the answers."""

    def __init__(
        self,
        connection: NodeConnection,
        identity: Mapping[str, str],
        workers: ClientWorkers,
        configs: RunConfigs,
        fleet: FleetLink,
    ) -> None:
        """identity: what the node says of itself: client, device, version. fleet: takes what went by Flower."""
        self._connection, self._identity, self._workers, self._configs = connection, identity, workers, configs
        self._fleet, self._lock = fleet, threading.Lock()
        self._pass, self._looked = "", 0.0
        self._answers: dict[str, Outcome] = {}
        """By the message's id, what was answered and may be asked for again."""

    def sign_on(self) -> bool:
        """Get the node's id and a pass; return False if its key is not registered. NoRouteError without an exchange."""
        document, _ = self._request(protocol.WHO, self._identity)
        self._connection.node, self._pass = document["node"], document.get("pass", "")
        return bool(document["node"])

    def serve(self) -> None:
        """Wait until there are messages, and begin them."""
        by_flower = self._fleet.ids
        working = [message_id for message_id in self._workers.busy if message_id not in by_flower]
        with self._lock:
            answered = [message_id for message_id in self._answers if message_id not in working]
        request = {"working": working, "answered": answered, "wait": protocol.WAIT}
        document, contents = self._with_pass(protocol.NEXT, request)
        for message_id in document["drop"]:
            self._workers.cancel(message_id)
            with self._lock:
                self._answers.pop(message_id, None)
        for message_id in document["again"]:
            with self._lock:
                outcome = self._answers.get(message_id)
            if outcome is not None:
                self._send(message_id, outcome)
        if "message" in document:
            self._begin(document["message"], contents[0])
        if document["ask_flower"] or time.monotonic() > self._looked + FLOWER_SECONDS:
            while self._fleet.pull():
                pass
            self._looked = time.monotonic()

    def answer(self, message: ReceivedMessage, outcome: Outcome) -> None:
        """Send what became of a message; NoConnectionError if it has to be tried again."""
        with self._lock:
            self._answers[message.id] = outcome
        self._send(message.id, outcome)

    def _begin(self, head: Mapping[str, Any], content: bytes) -> None:
        run, message_id, packed = int(head["run"]), str(head["id"]), np.frombuffer(content, np.uint8)
        try:
            scenario = self._configs.find_scenario(self._connection, run)
        except (RunOverError, ValueError) as error:
            message = ReceivedMessage(message_id, run, head["kind"], "", packed)
            self.answer(message, Outcome(raised=f"{type(error).__name__}: {error}"))
        else:
            self._workers.begin(ReceivedMessage(message_id, run, head["kind"], scenario, packed))

    def _send(self, message_id: str, outcome: Outcome) -> None:
        code = DIED if outcome.died else RAISED if outcome.raised else 0
        head = {"id": message_id, "code": code, "reason": outcome.died or outcome.raised}
        self._with_pass(protocol.ANSWER, head, [] if outcome.content is None else [outcome.content.tobytes()])

    def _with_pass(
        self, path: str, document: dict[str, Any], contents: Sequence[bytes] = ()
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Send a request with the pass, and with a new one if that is not valid any more."""
        try:
            return self._request(path, {**document, "pass": self._pass}, contents)
        except RefusedError as error:
            if error.status != UNAUTHORISED:
                raise
        if not self.sign_on():
            raise RefusedError("its key is not registered", UNAUTHORISED)
        return self._request(path, {**document, "pass": self._pass}, contents)

    def _request(
        self, path: str, document: Mapping[str, Any], contents: Sequence[bytes] = ()
    ) -> tuple[dict[str, Any], list[bytes]]:
        body = protocol.encode(document, contents)
        return protocol.decode(self._connection.request(path, body, protocol.WAIT + protocol.MARGIN))
