"""The runs of a sweep: their values, folders and scores."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_fed.runs.folder import SCENARIO
from grpo_fed.runs.metrics import NORMALISED_TRAINING, TRAINING_RETURN
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.runs.results import ENDED, read_results
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.tasks.scores import are_known, scales_of, unknown_scales_cure

LONGEST_NAME = 120
"""Characters of a folder's name."""


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    values: tuple[tuple[str, str], ...]
    """The keys that the sweep varies, but for the seed, with the run's values."""
    seed: int
    scenario: Scenario
    folder: Path
    score: float | None = None
    """The interquartile mean of its clients' final returns, or of their normalised scores; None if it has none."""
    status: str = "waits"
    """`waits`, or how it ended: `finished`, `stopped`, `interrupted` or `failed`."""
    problem: str = ""
    """Why it failed, or why it was stopped."""

    @property
    def label(self) -> str:
        """Its values and its seed, for people."""
        return " ".join([*(f"{key}={value}" for key, value in self.values), f"seed={self.seed}"])

    @property
    def short_label(self) -> str:
        """The same with the last parts of the keys, where these are unlike, for MLflow's narrow columns."""
        parts = [key.rpartition(".")[2] for key, _ in self.values]
        keys = parts if len({*parts}) == len(parts) else [key for key, _ in self.values]
        values = [f"{key}={value}" for key, (_, value) in zip(keys, self.values, strict=True)]
        return " ".join([*values, f"seed={self.seed}"])

    def read(self) -> SweptRun:
        """Return it with what its folder says of it."""
        document = read_results(self.folder) if self.folder.is_dir() else None
        if document is None:
            return self
        why = str(document.get("error") or document.get("reason") or "")
        return replace(self, score=score_of(document), status=document["status"], problem=why)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.status in ENDED


def score_of(document: Mapping[str, Any]) -> float | None:
    """Return the score in the content of `results.json`."""
    scores = document["eval"]
    score: float | None = scores["score_iqm"]
    return scores.get("normalised_iqm") if score is None else score


def round_score(record: RoundRecord) -> float | None:
    """Return what runs are compared by while they go on: the mean return of the round's training episodes, or score."""
    value = record_to_line(record).get(NORMALISED_TRAINING if record.scales else TRAINING_RETURN)
    return float(value) if isinstance(value, int | float) else None


def make_run(
    source: Path,
    overrides: Sequence[str],
    values: Sequence[tuple[str, str]],
    seed: str | None,
    folder: Path,
    option: str,
) -> SweptRun:
    """Make a run of a sweep from its values; ValueError names a key or value that the scenario cannot have.

    seed: None for the scenario's own. folder: that of all runs with these values. option: by which the user gave them.
    """
    given = [*values, *([] if seed is None else [("seed", seed)])]
    try:
        scenario = Scenario.load(source, [*overrides, *(f"{key}={value}" for key, value in given)])
    except ScenarioError as error:
        text = str(error)
        for key, value in given:
            text = text.replace(f"--set {key}={value}:", f"{option} {key}={value}:")
        raise ScenarioError(text) from None
    scales = scales_of(scenario)
    if not are_known(scales.values()):
        raise ValueError(f"a sweep ranks runs by one number: {unknown_scales_cure(scales)}")
    run = SweptRun(tuple(values), scenario.seed, scenario, folder / f"seed-{scenario.seed}")
    path = run.folder / SCENARIO
    if path.is_file() and path.read_text(encoding="utf-8") != scenario.dumps():
        raise ValueError(f"{run.folder}: holds a run of another scenario; name another folder with --out")
    return run


def folder_name(values: Sequence[tuple[str, str]]) -> str:
    """Name the folder of all runs with these values, for any file system; `base` if there are none."""
    if not values:
        return "base"
    name = ",".join(f"{key}={value}" for key, value in values)
    safe = re.sub(r"[^\w.,=+-]+", "_", name, flags=re.ASCII)
    if safe != name or len(safe) > LONGEST_NAME:
        safe = f"{safe[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe
