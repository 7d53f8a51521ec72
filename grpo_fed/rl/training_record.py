"""What a client does while it is trained, collected for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo_fed.rl.records import Episode, TrainingReport
from grpo_fed.rl.trajectories import Trajectories
from grpo_fed.scenario.scenario import Scenario


@dataclass
class TrainingRecord:
    """What one client does while it is trained."""

    steps: int = 0
    episodes: list[Episode] = field(default_factory=list)
    losses: list[Mapping[str, float]] = field(default_factory=list)
    constraints: list[Mapping[str, float]] = field(default_factory=list)
    rollbacks: list[bool] = field(default_factory=list)
    """Whether each update was taken back; empty where none may be."""
    trajectories: Trajectories | None = None
    """Its last batch."""

    def report(self, client: str, penalty: Mapping[str, float], scenario: Scenario) -> TrainingReport:
        """Make the client's report. penalty: the metrics of its group penalty."""
        losses, more = mean_by_name(self.losses), mean_by_name(self.constraints)
        if scenario.objective.cost.limit is not None:
            more["charts/cost_limit"] = scenario.objective.cost.limit
        if self.rollbacks:
            more["trust/rollbacks"] = float(sum(self.rollbacks))
            more["trust/rollback_episodes"] = 2.0 * scenario.trust.rollback_episodes * len(self.rollbacks)
        return TrainingReport(client, self.steps, tuple(self.episodes), losses, penalty, more)


def mean_by_name(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over updates of each number; empty without an update."""
    names = tuple(updates[0]) if updates else ()
    numbers = np.array([[update[name] for update in updates] for name in names])
    return dict(zip(names, numbers.mean(axis=-1).tolist(), strict=True)) if names else {}
