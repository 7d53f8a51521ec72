"""Early stopping: a run ends before its last round when its evaluations say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from grpo_fed.scenario.settings import StopSettings


@dataclass
class EarlyStopping:
    """Decides from the evaluations so far whether the run goes on; a checkpoint holds it."""

    best: tuple[int, float] | None = None
    """The round with the best evaluation, and its score."""
    stale: int = 0
    """Evaluations since the best one."""
    is_due: bool = False
    """Whether the run ends before its last round."""

    def observe(self, settings: StopSettings, round: int, scores: Mapping[str, float]) -> None:
        """Take note of a round's evaluation; scores: mean returns by client, empty if there was none.

        The run's score is the median over the clients, which fewer than half of them cannot raise or lower beyond what
        others report. Round 0 does not count.
        """
        if not scores or round == 0:
            return
        score = float(np.median(np.array(list(scores.values()))))
        if self.best is None or score > self.best[1]:
            self.best, self.stale = (round, score), 0
        else:
            self.stale += 1
        reached = settings.target is not None and score >= settings.target
        self.is_due = reached or 0 < settings.patience <= self.stale
