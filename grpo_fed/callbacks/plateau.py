"""StopOnPlateau: ends a run whose metric does not improve, or has reached a target.

`[stop]` does that for the median return of evaluations, which hostile clients cannot move much. This callback does it
for any metric of the line, such as the training return, which every round has without an evaluation.
"""

from __future__ import annotations

from typing import Any, final

from grpo_fed.callbacks.control import RunControl
from grpo_fed.callbacks.values import (
    Mode,
    check_is_recorded,
    check_watched,
    default_metric,
    is_better,
    metric_of,
)
from grpo_fed.runs.metrics import TRAINING_RETURN
from grpo_fed.runs.records import RoundRecord


@final
class StopOnPlateau:
    """Stops a run after `patience` rounds in a row without a better value."""

    def __init__(
        self,
        metric: str | None = None,
        patience: int = 0,
        margin: float = 0.0,
        target: float | None = None,
        mode: Mode = "max",
    ) -> None:
        """Watch a metric of the whole; rounds without it do not count, and neither does round 0.

        metric: None for the mean training return, normalised where clients have unlike environments.
        patience: 0 for no limit. margin: by how much a value must be better. target: stop as soon as it is reached.
        mode: whether higher ("max") or lower values ("min") are better.
        """
        name = type(self).__name__
        check_watched(name, metric or TRAINING_RETURN, mode)
        if patience < 0 or margin < 0:
            raise ValueError(f"{name}: patience = {patience}, margin = {margin}: must not be below 0")
        if not patience and target is None:
            raise ValueError(f"{name}: would never stop; give it a patience or a target")
        self.metric, self.is_default = metric or TRAINING_RETURN, metric is None
        self.patience, self.margin, self.target, self.mode = patience, margin, target, mode
        self.best: float | None = None
        """The best value so far."""
        self.stale = 0
        """Values since the best one."""

    def on_run_start(self, run: RunControl) -> None:
        """Choose the metric if none was given; refuse one that the run does not record."""
        if self.is_default:
            self.metric = default_metric(TRAINING_RETURN, run.scenario)
        check_is_recorded(type(self).__name__, self.metric, run.scenario)

    def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
        """Compare the round's value with the best one."""
        value = metric_of(record, self.metric)
        if value is None or record.round == 0:
            return
        if is_better(value, self.best, self.mode, self.margin):
            self.best, self.stale = value, 0
        else:
            self.stale += 1
        reached = self.target is not None and (value >= self.target if self.mode == "max" else value <= self.target)
        if reached:
            run.stop(f"{self.metric} = {value:g} has reached {self.target:g}")
        elif 0 < self.patience <= self.stale:
            run.stop(f"{self.metric} was not better than {self.best:g} for {self.stale} rounds")

    def state(self) -> dict[str, Any]:
        """Return the best value and the number of values since."""
        return {"best": self.best, "stale": self.stale}

    def restore(self, state: Any) -> None:
        """Take up a state."""
        self.best, self.stale = state["best"], int(state["stale"])
