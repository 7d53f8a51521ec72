"""RunControl: what a callback sees of the run, and what it may do with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import numpy as np

from grpo_fed.runs.metrics import CALLBACK, is_tracked
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean

SavePolicies = Callable[[Path], Mapping[str, str]]
"""Writes the clients' policies to a folder, and returns those that could not be saved, with the reason."""


@final
class RunControl:
    """The run, for its callbacks: each moment gets it first."""

    def __init__(
        self,
        scenario: Scenario,
        folder: Path | None,
        read_shared: Callable[[], Mapping[str, np.ndarray]],
        save_policies: SavePolicies | None = None,
    ) -> None:
        """Prepare for a run.

        read_shared: returns the shared blocks by parameter. save_policies: None where clients keep their policies.
        """
        self.scenario, self.folder = scenario, folder
        self.round = 0
        """The round's number, from 1; 0 before the first."""
        self.stop_reason: str | None = None
        """Why a callback has stopped the run; None if none has."""
        self.rate_factor = 1.0
        """What the learning rates of all clients are multiplied by."""
        self.whole: dict[str, float] = {}
        """The metrics of the whole that were logged for the round's record."""
        self.of_clients: dict[str, dict[str, float]] = {}
        """Those of clients."""
        self.records = True
        """Whether a record will follow that can hold metrics."""
        self._clients = {name for settings in scenario.clients for name in settings.names}
        self._read_shared, self._save_policies = read_shared, save_policies

    def log(self, name: str, value: float, client: str | None = None) -> None:
        """Log a metric of the round, or of a client in it, under the key `callback/NAME`.

        It is in the line of `rounds.jsonl`, in MLflow, and in a figure. The mean of a metric that clients have is that
        of the whole, unless it is logged too. A value that is not finite is recorded as unknown.
        """
        if not self.records:
            raise ValueError(f"log({name!r}): the run has ended, and no record follows")
        key = f"{CALLBACK}{name}"
        if not name or not is_tracked(key):
            raise ValueError(f"log({name!r}): a metric's name has letters, digits, spaces and _ - . / only")
        if client is not None and client not in self._clients:
            cure = did_you_mean(closest_match(client, sorted(self._clients)))
            raise ValueError(f"log({name!r}, client={client!r}): there is no such client{cure}")
        metrics = self.whole if client is None else self.of_clients.setdefault(client, {})
        metrics[key] = float(value)

    def stop(self, reason: str) -> None:
        """End the run after this round, with an evaluation; its result has the status `stopped` and the first reason.

        reason: in words, for a person.
        """
        if not reason.strip():
            raise ValueError(f"stop({reason!r}): give a reason in words")
        if self.stop_reason is None:
            self.stop_reason = " ".join(reason.split())

    @property
    def learning_rate(self) -> float:
        """The learning rate of clients without one of their own, before `objective.schedule`."""
        return self.scenario.objective.learning_rate * self.rate_factor

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        """Set it for the work that clients are given from now on.

        The learning rates that clients have of their own change by the same factor.
        """
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"learning_rate = {value!r}: must be a number above 0")
        self.rate_factor = float(value) / self.scenario.objective.learning_rate

    @property
    def shared(self) -> dict[str, np.ndarray]:
        """Copies of the shared blocks, by the names of their parameters."""
        return {name: np.array(array) for name, array in self._read_shared().items()}

    @property
    def can_save_policies(self) -> bool:
        """Whether `save_policies` works: not where clients keep their policies themselves."""
        return self._save_policies is not None

    def save_policies(self, folder: Path) -> Mapping[str, str]:
        """Write the clients' present policies to `folder/policies`; return those that could not be, with the reason."""
        if self._save_policies is None:
            raise ValueError("save_policies: the clients of this engine keep their policies; use the engine local")
        return self._save_policies(folder)
