"""Early stopping: a run ends before its last round when its evaluations say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.scores import are_known, scales_of


@dataclass
class EarlyStopping:
    """Decides from the evaluations so far whether the run goes on; a checkpoint holds it."""

    best: tuple[int, float] | None = None
    """The round with the best evaluation, and its score."""
    stale: int = 0
    """Evaluations since the best one."""
    is_due: bool = False
    """Whether the run ends before its last round."""

    def observe(self, scenario: Scenario, round: int, scores: Mapping[str, float]) -> None:
        """Take note of a round's evaluation; scores: mean returns by client, empty if there was none.

        The run's score is the median over the clients, which fewer than half of them cannot raise or lower beyond what
        others report. Where clients have unlike environments it is the median of their normalised scores, and without
        these there is none. Round 0 does not count.
        """
        scores = comparable_scores(scenario, scores)
        if not scores or round == 0:
            return
        score = float(np.median(np.array(list(scores.values()))))
        settings = scenario.stop
        if self.best is None or score > self.best[1]:
            self.best, self.stale = (round, score), 0
        else:
            self.stale += 1
        reached = settings.target is not None and score >= settings.target
        self.is_due = reached or 0 < settings.patience <= self.stale


def comparable_scores(scenario: Scenario, scores: Mapping[str, float]) -> Mapping[str, float]:
    """Return scores that have a median: the returns by client, normalised where environments are unlike; else none."""
    scales = scales_of(scenario)
    if not scales:
        return scores
    if not are_known(scales.values()):
        return {}
    scale_of = {name: scales[entry.name] for entry in scenario.clients for name in entry.names}
    return {name: scale_of[name].normalise(value) for name, value in scores.items()}
