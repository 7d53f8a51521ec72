"""What a run leaves behind: a folder with its scenario, a line for each round, its policies and its results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.results import read_results
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean

ROUNDS = "rounds.jsonl"
ENGINE = "engine.json"
"""What the engine was begun with."""
FAILURE = "failure.txt"
"""Where the command line writes what stopped a run."""


def open_unfinished(folder: Path) -> tuple[Scenario, Checkpoint | None]:
    """The run that a folder holds and where it stands, None at its start; ValueError if that is nowhere."""
    scenario = read_scenario(folder)
    check_unfinished(folder)
    after = checkpoint.latest(folder)
    if after is None and not scenario.checkpoint.every:
        raise ValueError(f"{folder}: has no checkpoint to go on from, for its scenario has checkpoint.every = 0")
    return scenario, after


def write_engine_state(folder: Path | None, engine: Mapping[str, Any]) -> None:
    """What an engine wants to find again although a run was stopped before its first checkpoint."""
    if folder is not None and engine:
        write_atomic(folder / ENGINE, json.dumps(engine) + "\n")


def read_engine_state(folder: Path) -> dict[str, Any]:
    """What `note_engine` wrote; nothing if it did not come to that."""
    path = folder / ENGINE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def check_unfinished(folder: Path) -> None:
    """ValueError for a run that came to its end."""
    results = read_results(folder)
    if results is not None and results["status"] == "finished":
        raise ValueError(f"{folder}: has finished, and there is nothing to go on with; train anew to train longer")


def check_usable(folder: Path) -> None:
    """ValueError for a folder that holds something other than a run, or cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a run needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ROUNDS).is_file():
        raise ValueError(f"{folder}: is not empty and holds no run; name another folder, or empty this one")
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{folder}: cannot be made, for {above} is a file; name another folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{folder}: cannot be made, for {above} may not be written to; name another folder")


SCENARIO = "scenario.toml"
POLICIES = "policies"


def read_client_names(folder: str | Path) -> list[str]:
    """Of a run folder."""
    return [name for settings in read_scenario(Path(folder)).clients for name in settings.names]


def read_scenario(folder: Path) -> Scenario:
    """Of a run folder; ValueError if it is none."""
    if not (folder / SCENARIO).is_file():
        beside = [one.parent.name for one in folder.parent.glob(f"*/{SCENARIO}")]
        close = closest_match(folder.name, beside)
        cure = did_you_mean(str(folder.parent / close) if close else None)
        what = f"there is no {SCENARIO} in it" if folder.exists() else "there is no such folder"
        raise ValueError(f"{folder}: no run folder: {what}{cure}")
    return Scenario.load(folder / SCENARIO)
