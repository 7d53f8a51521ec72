"""Chooses the clients that take part in a round, and ends a run in which too few do."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, final

import numpy as np

from grpo_fed.aggregation.privacy.noise import system_uniform
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import RoundSettings
from grpo_fed.scenario.toml.text import shorten

PAUSE = 0.1
"""Seconds between two checks of which clients can be reached."""
SOON, LATER = 1.0, 60.0
"""Seconds of waiting before the missing clients are logged, and before they are logged again."""

CURE = "start them with `grpo-fed deploy client`; `grpo-fed deploy status` shows who is connected"
"""What to do about clients that are missing."""

log = logging.getLogger(__name__)


Reachable: TypeAlias = Callable[[], tuple[str, ...]]
"""Finds all clients that can be reached now."""


class RunPausedError(Exception):
    """A federation has stopped after a round, without an end, so that another goes on from its checkpoint."""


class QuorumLostError(RuntimeError):
    """Too few clients answered in too many rounds in a row."""


@final
class Attendance:
    """Waits for clients that can be reached: for all of them before the first round, for a quorum before others."""

    def __init__(
        self, settings: RoundSettings, clients: Sequence[str], training: Sequence[str], reachable: Reachable
    ) -> None:
        """clients, training: all of them, and those that train. reachable: finds those that can be reached now."""
        self._settings, self._clients, self._training, self._reachable = settings, clients, training, reachable
        self.has_begun = False
        """Whether all clients were waited for."""

    def wait(self) -> tuple[str, ...]:
        """Wait, `round.deadline` seconds at most; return the clients that can be reached."""
        clients = self._training if self.has_begun else self._clients
        count = ceil_fraction(self._settings.quorum, len(clients)) if self.has_begun else len(clients)
        self.has_begun = True
        return wait_for_clients(self._reachable, clients, count, self._settings.deadline)


def wait_for_clients(
    connected: Reachable, clients: Iterable[str], count: int, deadline: float | None
) -> tuple[str, ...]:
    """Wait until `count` of the clients are connected or `deadline` seconds have passed; return all that are connected.

    connected: finds all clients that can be reached now. Clients that are missing are logged at once and every minute.
    """
    began, awaited = time.monotonic(), set(clients)
    next_line = began + SOON
    until = math.inf if deadline is None else began + deadline
    while len(awaited.intersection(names := connected())) < count and (now := time.monotonic()) < until:
        if now > next_line:
            next_line += LATER
            missing = ", ".join(sorted(awaited - set(names)))
            log.warning("waiting for %s; %s", shorten(missing), CURE)
        time.sleep(PAUSE)
    return names


def sample_clients(scenario: Scenario, connected: tuple[str, ...], round: int) -> list[str]:
    """Choose the clients that take part in a round, in the order of their names.

    connected: all clients that can be reached now; those with `trains = false` take no part. With `round.fraction`
    below 1 a part of the others is sampled from the round's own random stream, so the choice depends on the seed and
    the round's number alone. With a privacy budget each client takes part with this probability, whoever else does,
    as the accountant assumes (Poisson sampling).
    """
    trained = {name for settings in scenario.clients if settings.trains for name in settings.names}
    ordered = sorted(trained.intersection(connected))
    if scenario.round.fraction == 1 or not ordered:
        return ordered
    if scenario.privacy.epsilon is not None:
        takes_part = dict(zip(sorted(trained), _private_draws(scenario, len(trained), round), strict=True))
        return [name for name in ordered if takes_part[name] < scenario.round.fraction]
    stream = generator(scenario.seed, Purpose.PARTICIPATION, round)
    chosen = stream.choice(len(ordered), ceil_fraction(scenario.round.fraction, len(ordered)), replace=False)
    return [ordered[index] for index in sorted(chosen.tolist())]


def _private_draws(scenario: Scenario, clients: int, round: int) -> np.ndarray:
    """Draw a number from 0 to below 1 for each client, [K]."""
    if scenario.privacy.source == "system":
        return system_uniform(clients)
    return generator(scenario.seed, Purpose.PARTICIPATION, round).random(clients)


def ceil_fraction(fraction: float, count: int) -> int:
    """Compute a fraction of a count, rounded up (but not for a rounding error), at least 1."""
    return max(1, math.ceil(fraction * count - 1e-9))


def has_quorum(scenario: Scenario, answers: int, sampled: int) -> bool:
    """Return whether the answers of the sampled clients are enough for a merge.

    With a privacy budget a round for which nobody was drawn is merged too, as noise alone: otherwise it would tell that
    nobody was.
    """
    is_noise_alone = not sampled and scenario.privacy.epsilon is not None
    return is_noise_alone or answers >= ceil_fraction(scenario.round.quorum, sampled)


def check_quorum(settings: RoundSettings, below: int, round: int, failures: Mapping[str, Failure]) -> None:
    """QuorumLostError if the latest `below` rounds in a row were without a quorum, and that is too many."""
    if below < settings.patience:
        return
    first, more = list(failures.items())[:3], len(failures) - 3
    reasons = "; ".join(f"{name} {failure.kind}: {failure.reason}" for name, failure in first)
    who = "a buffer's clients" if settings.mode == "buffered" else "the sampled clients"
    raise QuorumLostError(
        f"too few answers in rounds {round - below + 1} to {round}: round.quorum = {settings.quorum:g} of {who} must"
        f" answer, and round.patience = {settings.patience} rounds have passed;"
        f" {reasons}{f' and {more} more' if more > 0 else ''}"
    )
