"""The moments of a run at which callbacks are called, and the records that they get.

A callback is any object with one or more of the methods of `Callback`; it need not inherit from it. The order in a
round is on_round_start, on_client_trained for each client, on_merge, on_round_end. The server calls callbacks, so
clients need not have them.

Where clients evaluate with the next round's training, as on Flower's engines, a round that is evaluated ends when the
scores have come: its on_round_end is called in the next round, after that one's on_round_start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from grpo_fed.aggregation.proximity.records import AcceptedStep
from grpo_fed.callbacks.control import RunControl
from grpo_fed.runs.metrics import TRAINING_RETURN
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result


@dataclass(frozen=True)
class TrainedClient:
    """What a client did in a round."""

    client: str
    """Its name."""
    steps: int
    """Environment steps that it learned from."""
    episodes: int
    """Training episodes that finished."""
    metrics: Mapping[str, float]
    """Metrics of its training, by the keys of `rounds.jsonl`."""
    age: int | None = None
    """Merges since it began; None if the server waits for all clients."""

    @property
    def mean(self) -> float | None:
        """Mean return of its training episodes; None if none finished."""
        return self.metrics.get(TRAINING_RETURN)


@dataclass(frozen=True)
class MergedRound:
    """What a merge came to."""

    weights: Mapping[str, float]
    """The weight of every client that answered."""
    step: AcceptedStep
    """The step of the shared blocks: KL, budget and fraction of each block."""
    departed: Mapping[str, tuple[str, ...]]
    """The shared parameter groups that each client has left, for the clients that have left any."""
    notes: tuple[str, ...]
    """Messages for a person."""


class Callback(Protocol):
    """The moments of a run. All of them are optional, and so are `state` and `restore`, which come together."""

    def on_run_start(self, run: RunControl) -> None:
        """Called once, before the first round; when a run is resumed too, after `restore`."""

    def on_round_start(self, run: RunControl) -> None:
        """Called before clients are sampled and given work."""

    def on_client_trained(self, run: RunControl, work: TrainedClient) -> None:
        """Called for each client whose answer counts, in the order of their names, once all answers have come."""

    def on_merge(self, run: RunControl, merged: MergedRound) -> None:
        """Called after the shared blocks have moved; not in a round without a quorum."""

    def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
        """Called when the round is over, before its line is written; first with round 0, the evaluation before
        training.
        """

    def on_run_end(self, run: RunControl, result: Result) -> None:
        """Called last, when the results are written, however the run has ended."""

    def state(self) -> object:
        """Return what a checkpoint is to hold of the callback, as JSON has it."""

    def restore(self, state: object) -> None:
        """Take up the state of a checkpoint, before on_run_start."""
