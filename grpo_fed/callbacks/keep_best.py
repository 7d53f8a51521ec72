"""KeepBest: keeps the policies of the best round, in a folder that commands read like that of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
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
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import BEST, ROUNDS, SCENARIO
from grpo_fed.runs.metrics import SCORE_IQM
from grpo_fed.runs.records import RoundRecord, record_to_line

BEST_ROUND = "best.json"
"""The file that says which round it was, and the metric's value."""


@final
class KeepBest:
    """Keeps the policies of the round with the best value of a metric in `RUN/best`."""

    def __init__(self, metric: str | None = None, mode: Mode = "max") -> None:
        """Watch a metric of the whole; round 0 does not count.

        metric: None for the interquartile mean of evaluations, normalised where clients have unlike environments.
        mode: whether higher ("max") or lower values ("min") are better.
        """
        check_watched(type(self).__name__, metric or SCORE_IQM, mode)
        self.metric, self.is_default, self.mode = metric or SCORE_IQM, metric is None, mode
        self.best: float | None = None
        """The best value so far."""

    def on_run_start(self, run: RunControl) -> None:
        """Refuse a run that has no folder, no policies at hand, or not the metric."""
        name = type(self).__name__
        if self.is_default:
            self.metric = default_metric(SCORE_IQM, run.scenario)
        check_is_recorded(name, self.metric, run.scenario)
        if run.folder is None:
            raise ValueError(f"{name}: the run has no folder to keep policies in; give it one with out")
        if not run.can_save_policies:
            raise ValueError(f"{name}: the clients of this engine keep their policies; use the engine local")

    def on_round_end(self, run: RunControl, record: RoundRecord) -> None:
        """Keep the policies of a round that is better than all before."""
        value = metric_of(record, self.metric)
        if value is None or record.round == 0 or not is_better(value, self.best, self.mode):
            return
        assert run.folder is not None, "a run without a folder was refused"
        self.best = value
        _write(run, run.folder / BEST, record, {"round": record.round, self.metric: value})

    def state(self) -> float | None:
        """Return the best value."""
        return self.best

    def restore(self, state: Any) -> None:
        """Take up a state."""
        self.best = state


def _write(run: RunControl, folder: Path, record: RoundRecord, facts: dict[str, Any]) -> None:
    """Write the policies beside each other, then put them in place of those of an earlier round."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for client, reason in run.save_policies(partial).items():
        raise ValueError(f"the policy of {client} could not be saved: {reason}")
    write_atomic(partial / SCENARIO, run.scenario.dumps())
    write_atomic(partial / ROUNDS, json.dumps(record_to_line(record), allow_nan=False) + "\n")
    write_atomic(partial / BEST_ROUND, json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
