"""The table of a sweep, best first, and the files `sweep.json` and `sweep.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fed.reports.formatting import format_count, format_return
from grpo_fed.reports.sweep.points import SweptRun
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.metrics import NORMALISED_IQM, SCORE_IQM
from grpo_fed.runs.results import ENDED
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.scores import scales_of

SWEEP = "sweep"
"""The name of the files, without `.json` and `.md`."""
MOST_ROWS = 100
"""Rows of the table in `sweep.md` and in MLflow; `sweep.json` has all."""


@dataclass(frozen=True)
class SweptPoint:
    """The runs with the same values, over their seeds."""

    values: tuple[tuple[str, str], ...]
    runs: tuple[SweptRun, ...]

    @property
    def name(self) -> str:
        """Its values, for people."""
        return ", ".join(f"{key} = {_short(value)}" for key, value in self.values) or "as it is"

    @property
    def scores(self) -> list[float]:
        """The scores of the runs that have finished; those that were stopped early do not count."""
        return [run.score for run in self.runs if run.status == "finished" and run.score is not None]

    @property
    def mean(self) -> float | None:
        """The mean of the scores; None without any."""
        return float(np.mean(self.scores)) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Their standard deviation over seeds, with n - 1; None with fewer than two."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class SweepResult:
    """What became of a sweep."""

    scenario: Scenario
    """The first run's scenario."""
    points: tuple[SweptPoint, ...]
    """Best first; those without a score last."""
    runs: tuple[SweptRun, ...]
    out: Path
    note: str = ""
    """A message for a person, if MLflow did not get all."""

    @property
    def best(self) -> SweptPoint | None:
        """The point with the highest mean score; None if no run has one."""
        return self.points[0] if self.points and self.points[0].scores else None

    @property
    def problems(self) -> list[str]:
        """What became of the runs that failed or were interrupted, and how many were stopped early."""
        stopped = sum(run.status == "stopped" for run in self.runs)
        unlike = [run for run in self.runs if run.status not in ENDED]
        lines = [f"{run.label}: {run.status}: {run.problem}".rstrip(": ") for run in unlike]
        return [*lines, *([f"stopped early: {format_count(stopped, 'run')}"] if stopped else [])]

    @property
    def score_name(self) -> str:
        """What runs are ranked by, in words."""
        return "normalised score" if scales_of(self.scenario) else "return"

    def with_note(self, note: str) -> SweepResult:
        """Return it with a message."""
        return replace(self, note=note)

    def metrics(self) -> dict[str, float]:
        """Make the metrics of the parent run in MLflow."""
        best = self.best
        counts = {"sweep/runs": float(len(self.runs)), "sweep/points": float(len(self.points))}
        if best is None or best.mean is None:
            return counts
        spread = {} if best.spread is None else {"sweep/best_spread": best.spread}
        return {"sweep/best_return": best.mean, **spread, **counts}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Make the rows of the table: mean return, its spread, how many seeds count, values."""
        return [
            (
                format_return(point.mean),
                "" if point.spread is None else format_return(point.spread),
                f"{len(point.scores)} of {len(point.runs)}",
                point.name,
            )
            for point in self.points
        ]

    def page(self) -> str:
        """Write the table in Markdown."""
        lines = []
        if (best := self.best) is not None:
            spread = "" if best.spread is None else f", standard deviation {format_return(best.spread)} over seeds"
            count = format_count(len(best.scores), "seed")
            lines.append(
                f"**Best: `{best.name}`**, {self.score_name} {format_return(best.mean)} (mean of {count}{spread})."
            )
        table = [f"| {self.score_name} | spread over seeds | seeds | values |", "| --- | --- | --- | --- |"]
        table += [f"| {' | '.join(numbers)} | `{name}` |" for *numbers, name in self.rows()[:MOST_ROWS]]
        lines.append("\n".join(table))
        lines.append(f"The {self.score_name} of a run is the interquartile mean over its clients after training.")
        if len(self.points) > MOST_ROWS:
            lines.append(f"{len(self.points) - MOST_ROWS:,} more are in `{SWEEP}.json`.")
        if self.problems:
            lines.append("\n".join(["Not in the table:", "", *(f"- {line}" for line in self.problems[:MOST_ROWS])]))
        return "\n\n".join(lines) + "\n"

    def document(self) -> dict[str, Any]:
        """Make the content of `sweep.json`."""
        return {
            "scenario": self.scenario.name,
            "score": NORMALISED_IQM if scales_of(self.scenario) else SCORE_IQM,
            "best": None if self.best is None else dict(self.best.values),
            "points": [
                {
                    "values": dict(point.values),
                    "mean": point.mean,
                    "spread": point.spread,
                    "runs": [
                        {
                            "seed": run.seed,
                            "folder": str(run.folder.relative_to(self.out)),
                            "status": run.status,
                            "score": run.score,
                            **({"problem": run.problem} if run.problem else {}),
                        }
                        for run in point.runs
                    ],
                }
                for point in self.points
            ],
        }


def _short(value: str) -> str:
    """Shorten a number with many digits."""
    try:
        return value if len(value) <= 7 else f"{float(value):.4g}"
    except ValueError:
        return value


def rank_points(runs: Sequence[SweptRun]) -> tuple[SweptPoint, ...]:
    """Put the runs with the same values together, and sort them by their mean scores, best first."""
    points: dict[tuple[tuple[str, str], ...], list[SweptRun]] = {}
    for run in runs:
        points.setdefault(run.values, []).append(run)
    made = [SweptPoint(values, tuple(of_point)) for values, of_point in points.items()]
    return tuple(sorted(made, key=lambda point: (point.mean is None, -(point.mean or 0.0))))


def write_sweep(result: SweepResult) -> None:
    """Write `sweep.json` and `sweep.md`."""
    write_atomic(result.out / f"{SWEEP}.json", json.dumps(result.document(), indent=2, allow_nan=False) + "\n")
    write_atomic(result.out / f"{SWEEP}.md", f"# Sweep of {result.scenario.name}\n\n{result.page()}")
