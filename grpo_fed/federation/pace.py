"""Virtual time: how long a round of a client takes, by its pace; nothing waits for it.

Times are whole microseconds, so that sums and comparisons of them are exact.
"""

from __future__ import annotations

import math

from grpo_fed.rl.rng import Purpose, client_seed, generator
from grpo_fed.scenario.scenario import Scenario

MICROSECONDS = 1_000_000


class Paces:
    """The virtual durations of all clients' rounds."""

    def __init__(self, scenario: Scenario) -> None:
        self._seed, self._steps = scenario.seed, scenario.steps
        self._settings = {name: entry for entry in scenario.clients for name in entry.names}
        paces = {(entry.pace, entry.jitter) for entry in scenario.clients}
        self.matter = scenario.round.mode == "buffered" or paces != {(1.0, 0.0)}
        """Whether the run's records should have virtual times."""

    def duration(self, client: str, number: int) -> int:
        """Compute the microseconds that a client's `number`-th round takes, at least 1.

        With jitter it varies by a lognormal factor with mean 1, from the client's own stream.
        """
        settings = self._settings[client]
        seconds = settings.pace * self._steps / 1000
        if settings.jitter:
            stream = generator(client_seed(self._seed, client), Purpose.PACE, number)
            seconds *= math.exp(settings.jitter * stream.standard_normal() - settings.jitter**2 / 2)
        return max(1, round(seconds * MICROSECONDS))
