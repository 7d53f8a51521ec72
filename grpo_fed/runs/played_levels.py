"""The levels that a saved policy is played at: those that its client has reached, all of its task's, or one chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fed.runs.metrics import CURRICULUM_HIGH, CURRICULUM_LOW
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import CurriculumSettings
from grpo_fed.scenario.toml.text import closest_match, did_you_mean
from grpo_fed.tasks.curriculum import Curriculum, spread_levels

ALL = "all"
"""What is given in the place of a level for the levels of evaluations."""


@dataclass(frozen=True)
class PlayedLevels:
    """A box of levels, and where it comes from."""

    box: Mapping[str, tuple[float, float]]
    """The lowest and the highest value of each argument."""
    source: str
    """Where it comes from, in words."""

    def spread(self, count: int) -> dict[int, dict[str, float]]:
        """Spread levels evenly over the box, as evaluations do over the whole task: the level of each copy."""
        ranges = {name: list(edges) for name, edges in self.box.items()}
        rows = spread_levels(Curriculum(CurriculumSettings.model_construct(kind="uniform", ranges=ranges)), count)
        return {copy: dict(zip(self.box, level, strict=True)) for copy, level in enumerate(rows.tolist())}

    @property
    def middle(self) -> dict[str, float]:
        """The level in the middle, which films show."""
        return {name: (low + high) / 2 for name, (low, high) in self.box.items()}

    def __str__(self) -> str:
        edges = self.box.items()
        parts = [f"{name} {low:.4g}" + (f" to {high:.4g}" if high > low else "") for name, (low, high) in edges]
        return f"{', '.join(parts)} ({self.source})"


def describe_level(level: Mapping[str, float]) -> str:
    """Write a level, such as `length 0.5`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in level.items())


def reached_levels(scenario: Scenario, client: str, line: Mapping[str, Any] | None) -> PlayedLevels | None:
    """Find the levels that a client had in its last training; all of its task's where nothing is known of that.

    line: the last line of `rounds.jsonl`; None without one. Return None for a client whose task has no levels.
    """
    ranges = _ranges(scenario, client)
    if not ranges:
        return None
    metrics = {} if line is None else line["clients"].get(client, {})
    keys = {name: (CURRICULUM_LOW + name, CURRICULUM_HIGH + name) for name in ranges}
    if line is None or any(metrics.get(key) is None for pair in keys.values() for key in pair):
        return PlayedLevels(ranges, "all levels of its task, since the folder does not say which it had reached")
    known = {name: (float(metrics[low]), float(metrics[high])) for name, (low, high) in keys.items()}
    return PlayedLevels(known, f"the levels of its training in round {line['round']}")


def all_levels(scenario: Scenario, client: str) -> PlayedLevels:
    """Return the levels of evaluations, which are spread over all of a task."""
    return PlayedLevels(_ranges(scenario, client), "all levels of its task, as in evaluations")


def choose_levels(reached: PlayedLevels, given: Mapping[str, float], client: str) -> PlayedLevels:
    """Put chosen values, if there are any, in the place of what a client has reached.

    ValueError for values of what its levels do not have.
    """
    if not given:
        return reached
    for name in given:
        if name not in reached.box:
            cure = did_you_mean(closest_match(name, [*reached.box])) or f"; its levels have {', '.join(reached.box)}"
            raise ValueError(f"--level {name}: client {client} has no levels of {name}{cure}")
    rest = "" if len(given) == len(reached.box) else f", and for the rest {reached.source}"
    return PlayedLevels({**reached.box, **{name: (value, value) for name, value in given.items()}}, f"as chosen{rest}")


def parse_levels(texts: Sequence[str]) -> dict[str, float] | None:
    """Read `NAME=VALUE`, several of them separated by commas or given apart; None for `all`. ValueError for others."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if ALL in parts:
        if len(parts) > 1:
            raise ValueError(f"--level {ALL}: has all levels of the task; leave the others out")
        return None
    given: dict[str, float] = {}
    for part in parts:
        name, _, text = part.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise ValueError(f"--level {part}: write a name and a number, such as length=0.5, or {ALL}")
        given[name.strip()] = value
    return given


def _ranges(scenario: Scenario, client: str) -> dict[str, tuple[float, float]]:
    """Read the ranges of a client's levels; empty for a task without arguments that differ."""
    curricula = [entry.curriculum for entry in scenario.clients if client in entry.names]
    ranges = {} if not curricula or curricula[0] is None else curricula[0].ranges
    return {name: (low, high) for name, (low, high) in ranges.items()}
