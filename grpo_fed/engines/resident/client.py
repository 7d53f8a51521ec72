"""One client of a resident node: takes its messages from a SuperLink, has them answered, and sends the answers.

Connections may break and SuperLinks may be killed: then the client tries again with short pauses, while its workers go
on. An answer is sent until the SuperLink has it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias, final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from grpo_fed.engines.deploy.certificates import check_server
from grpo_fed.engines.resident.devices import describe_device
from grpo_fed.engines.resident.exchange_link import ExchangeLink
from grpo_fed.engines.resident.fleet_link import GHOST_SECONDS, FleetLink, NotYetAcceptedError
from grpo_fed.engines.resident.problems import explain_problem
from grpo_fed.engines.resident.run_configs import RunConfigs
from grpo_fed.engines.resident.workers import ClientWorkers, Outcome, ReceivedMessage
from grpo_fed.engines.wire.flower_private import NoConnectionError, NodeConnection, NoRouteError, RefusedError
from grpo_fed.engines.wire.grids import to_one_line

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds before a connection is tried again; the pause doubles up to the longest."""
REFUSED_PAUSE = 2.0
"""Seconds before a node that was refused tries again: its key may be registered meanwhile."""
SAY_AGAIN = 60.0
"""Seconds after which what is wrong is said again."""
LOOK_AGAIN = 86400.0
"""Seconds after which the server's certificate is looked at again."""

Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a client is served, and who it is."""

    client: str
    superlink: str
    authority: Path | None
    key: EllipticCurvePrivateKey
    made_own_key: bool
    """Whether the node registers its key itself."""
    state: Path | None
    """The folder of the clients' states; None for the default."""
    device: str | None = None
    """The torch device that the client computes on; None for the scenario's."""


@final
class ResidentClient:
    """Serves one client until it is stopped."""

    def __init__(self, place: Place, configs: RunConfigs, say: Say) -> None:
        """say: is called with a line at every event, from several threads."""
        self._place, self._say_line = place, say
        self._connection = NodeConnection(place.superlink, place.authority, place.key)
        given = {"state": place.state, "device": place.device}
        config = {"client": place.client} | {key: str(value) for key, value in given.items() if value is not None}
        identity = {
            "client": place.client,
            "device": describe_device(place.device or "auto"),
            "version": version("grpo-fed"),
        }
        self._workers = ClientWorkers(config, self._answer)
        self._fleet = FleetLink(self._connection, self._workers, configs)
        self._exchange = ExchangeLink(self._connection, identity, self._workers, configs, self._fleet)
        self._has_exchange = True
        self._stopping, self._said = threading.Event(), dict[str, float]()
        self._until = time.monotonic() + GHOST_SECONDS
        self._looked = -LOOK_AGAIN

    def run(self) -> None:
        """Serve until `stop` is called."""
        pause, problem = FIRST_PAUSE, ""
        while not self._stopping.is_set():
            try:
                self._sign_on()
                way = "" if self._has_exchange else ", by Flower's Fleet API: no `grpo-fed deploy server` started it"
                self._say(f"client {self._place.client} is connected to {self._place.superlink}{way}", bool(problem))
                pause, problem = FIRST_PAUSE, ""
                while not self._stopping.is_set():
                    self._look_at_certificate()
                    if self._has_exchange:
                        self._exchange.serve()
                    else:
                        self._stopping.wait(self._fleet.serve())
                    self._workers.end_idle()
            except NoConnectionError as error:
                problem = (
                    f"client {self._place.client}: {self._place.superlink}: {explain_problem(error)}; trying again"
                )
                if not isinstance(error, NotYetAcceptedError):
                    self._until = time.monotonic() + GHOST_SECONDS
                self._say(problem)
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except RefusedError as error:
                problem = (
                    f"client {self._place.client}: {self._place.superlink} does not accept it: {error}; is its key in"
                    " the server's nodes/, and was the server restarted since?"
                )
                self._say(problem)
                self._stopping.wait(REFUSED_PAUSE)
            except Exception as error:  # noqa: BLE001, a client must not fall silent
                problem = f"client {self._place.client}: {type(error).__name__}: {error}"
                self._say(f"{problem}\n{traceback.format_exc()}")
                self._stopping.wait(LONGEST_PAUSE)

    def stop(self) -> None:
        """Sign off, and end the workers."""
        self._stopping.set()
        self._workers.close()
        try:
            if self._connection.node:
                self._connection.deactivate()
        except (NoConnectionError, RefusedError):
            pass  # it counts as offline after a while
        self._connection.close()

    def _sign_on(self) -> None:
        """Sign on at the exchange, or at Flower's Fleet API if there is none."""
        try:
            self._has_exchange = True
            if self._exchange.sign_on():
                return
            if self._place.made_own_key:
                self._connection.register()
                if self._exchange.sign_on():
                    return
            raise RefusedError("its key is not registered")
        except NoRouteError:
            self._has_exchange = False
            self._fleet.sign_on(self._place.made_own_key, self._until)

    def _look_at_certificate(self) -> None:
        """Say once a day if the server's certificate expires soon."""
        authority, now = self._place.authority, time.monotonic()
        if authority is None or now < self._looked + LOOK_AGAIN:
            return
        self._looked = now
        try:
            for line in check_server(self._place.superlink, authority):
                self._say(f"client {self._place.client}: {line}")
        except (OSError, ValueError):
            pass  # what is wrong with the connection is said where it is used

    def _answer(self, message: ReceivedMessage, outcome: Outcome) -> None:
        """Send what became of a message, until it is accepted."""
        if outcome.raised or outcome.died:
            text = to_one_line(outcome.raised or outcome.died)
            self._say(f"client {self._place.client}, run {message.run}: {text}")
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            try:
                link = self._fleet if self._fleet.has(message) else self._exchange
                link.answer(message, outcome)
                return
            except NoConnectionError:
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except RefusedError as error:
                self._say(f"client {self._place.client}, run {message.run}: its answer is refused: {error}")
                return

    def _say(self, line: str, always: bool = False) -> None:
        """Say a line, but not what was said less than a minute ago."""
        now = time.monotonic()
        if always or now > self._said.get(line, -SAY_AGAIN) + SAY_AGAIN:
            self._said[line] = now
            self._say_line(line)
