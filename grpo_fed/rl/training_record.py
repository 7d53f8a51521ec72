"""What a client does while it is trained, collected for its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from grpo_fed.rl.records import Episode, TrainingReport
from grpo_fed.rl.trajectories import Trajectories


@dataclass
class TrainingRecord:
    """What one client does while it is trained."""

    steps: int = 0
    episodes: list[Episode] = field(default_factory=list)
    losses: list[Mapping[str, float]] = field(default_factory=list)
    trajectories: Trajectories | None = None
    """Its last batch."""

    def report(self, client: str, penalty: Mapping[str, float]) -> TrainingReport:
        names = tuple(self.losses[0]) if self.losses else ()
        losses = np.array([[loss[name] for loss in self.losses] for name in names])
        means = dict(zip(names, losses.mean(axis=-1).tolist(), strict=True)) if names else {}
        return TrainingReport(client, self.steps, tuple(self.episodes), means, penalty)
