"""RunMoments: calls the callbacks of a federation with what they get at each moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

import numpy as np

from grpo_fed.callbacks.calls import CallbackList, SavedCallbacks
from grpo_fed.callbacks.control import RunControl, SavePolicies
from grpo_fed.callbacks.moments import MergedRound, TrainedClient
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.round_record import name_groups
from grpo_fed.federation.server import Aggregation, Server
from grpo_fed.federation.sites import SiteTree
from grpo_fed.federation.trained_round import TrainedRound
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario


@final
class RunMoments:
    """The callbacks of a run, and what they have asked for."""

    def __init__(
        self,
        scenario: Scenario,
        shared_blocks: SharedBlocks,
        server: Server | SiteTree,
        folder: Path | None,
        given: Sequence[object],
        save_policies: SavePolicies | None,
        after: Checkpoint | None,
    ) -> None:
        """Make the callbacks, and take up the states that a checkpoint has of them.

        given: callbacks beside those that the scenario names. save_policies: as for `RunControl`.
        """
        self._shared_blocks, self._server = shared_blocks, server
        self.callbacks = CallbackList(scenario, given)
        self.control = RunControl(scenario, folder, self._read_shared, save_policies)
        self.control.round = 0 if after is None else after.round
        self.callbacks.restore(after, self.control)

    @property
    def stop_reason(self) -> str | None:
        """Why a callback has stopped the run; None if none has."""
        return self.control.stop_reason

    @property
    def rate(self) -> float:
        """What the learning rates of clients that are given work now are multiplied by."""
        return self.control.rate_factor

    @property
    def saved(self) -> SavedCallbacks:
        """What a checkpoint holds of the callbacks."""
        return self.callbacks.saved(self.control)

    def _read_shared(self) -> Mapping[str, np.ndarray]:
        return self._shared_blocks.layout.views(self._server.state.shared)

    # The moments -----------------------------------------------------------------------------------------------------

    def run_start(self) -> None:
        """The run begins, or goes on."""
        self.callbacks.run_start(self.control)

    def round_start(self, round: int) -> None:
        """A round begins."""
        self.control.round = round
        self.callbacks.round_start(self.control)

    def clients_trained(self, trained: TrainedRound) -> None:
        """All answers of a round have come."""
        ages = {} if trained.batch is None else trained.batch.ages
        works = [_work_of(name, trained.replies[name], ages.get(name)) for name in sorted(trained.replies)]
        self.callbacks.clients_trained(self.control, works)

    def merged(self, trained: TrainedRound, aggregation: Aggregation) -> None:
        """The shared blocks have moved."""

        def make() -> MergedRound:
            states = {name: self._server.state_of(name) for name in self._shared_blocks.clients}
            left = {
                name: name_groups(self._shared_blocks, state.departed.get(name, ())) for name, state in states.items()
            }
            return MergedRound(
                dict(trained.merge.weights),
                aggregation.step.accepted,
                {name: groups for name, groups in left.items() if groups},
                aggregation.notes,
            )

        self.callbacks.merged(self.control, make)

    def round_end(self, record: RoundRecord) -> RoundRecord:
        """A round is over; return its record with what callbacks have logged."""
        return self.callbacks.round_end(self.control, record)

    def round_waits(self, record: RoundRecord) -> RoundRecord:
        """A round is over but for its evaluation; return its record with what callbacks have logged so far."""
        return self.callbacks.round_waits(self.control, record)

    def run_end(self, result: Result, error: BaseException | None) -> None:
        """The run has ended; error: what ended it, None if nothing did."""
        self.callbacks.run_end(self.control, result, error)


def _work_of(client: str, reply: Trained, age: int | None) -> TrainedClient:
    return TrainedClient(client, reply.steps, reply.episodes, reply.metrics, age)
