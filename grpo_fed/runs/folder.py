"""A run's folder: the names of what is in it, and whether it may be used.

A process that trains holds a lock on the folder, so that no second run writes into it; the system releases the lock
however the process ends.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, final

from grpo_fed.policy.shared_names import CHECKPOINTS, POLICIES, SharedNames
from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.files import refuse_links, write_atomic
from grpo_fed.runs.merge_order import ORDER
from grpo_fed.runs.provenance import PROVENANCE
from grpo_fed.runs.results import RESULTS, read_results
from grpo_fed.runs.serialisation import from_json, parse_json, read_json
from grpo_fed.scenario.importing import RUN_MARKS, refuse_imports_from
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean

SCENARIO, ROUNDS = RUN_MARKS
SHARED = "shared.json"
"""Names of the shared blocks and of their parameter groups."""
ENGINE = "engine.json"
"""What the engine was begun with."""
FAILURE = "failure.txt"
"""The traceback of what stopped a run."""
SUMMARY, REPORT = "summary.md", "report.html"
CSV_FILES = ("rounds.csv", "clients.csv")
"""A run as tables: a row for each client and round, and a row for each client."""
PAPER = "paper"
"""Figures for a paper."""
CLIENTS, FIGURES, EPISODES = "clients", "figures", "episodes"
EXAMPLES = "examples"
TRACKING, FLOWER_LOGS = "tracking", "flower"
BEST, TENSORBOARD = "best", "tensorboard"
"""The folders of the callbacks that ship."""

FILES = (SCENARIO, ROUNDS, RESULTS, SHARED, ENGINE, ORDER, FAILURE, SUMMARY, REPORT, PROVENANCE, *CSV_FILES)
FOLDERS = (POLICIES, CHECKPOINTS, CLIENTS, FIGURES, PAPER, EPISODES, EXAMPLES, TRACKING, FLOWER_LOGS, BEST, TENSORBOARD)


CLAIMED = "GRPO_FED_CLAIMED_FOLDER"
"""The environment variable with the folder that a parent process has claimed for this one."""

log = logging.getLogger(__name__)


class FolderTakenError(ValueError):
    """A folder holds a run already, or another process is writing one into it."""


@final
class FolderClaim:
    """The right to write a run into a folder, from `claim_folder` or `reclaim_folder` until it is closed."""

    def __init__(self, folder: Path, handle: int | None, new_parents: Sequence[Path] = ()) -> None:
        """new_parents: folders above that were made for this claim, the nearest first."""
        self.folder = folder
        self._handle, self._new_parents = handle, new_parents

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; folders that nothing was written to are removed."""
        with suppress(OSError):  # it holds the run
            for folder in (self.folder, *self._new_parents):
                folder.rmdir()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def candidate_folders(scenario: Scenario) -> Iterator[Path]:
    """Name folders for a run without one, `runs/<scenario>-<seed>-<time>`, until one can be claimed."""
    name = f"{scenario.name}-{scenario.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for count in itertools.count(1):
        yield Path("runs") / (name if count == 1 else f"{name}-{count}")


def claim_folder(folder: Path, replace: bool = False) -> FolderClaim:
    """Claim a folder for a new run, and make it if there is none.

    FolderTakenError if another process is writing a run there, or if it holds one; with `replace` the recorder removes
    that one when the new run begins. ValueError if the folder holds something else or cannot be made.
    """
    check_usable(folder)
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    claim = _lock(folder, new_parents)
    if not replace and _holds_run(folder):
        claim.close()
        raise FolderTakenError(
            f"{folder}: holds a run; name another folder, or remove that run with --replace (replace=True)"
        )
    return claim


def claim_new_folder(scenario: Scenario) -> FolderClaim:
    """Claim a folder for a run without one."""
    for folder in candidate_folders(scenario):
        try:
            return claim_folder(folder)
        except FolderTakenError:
            continue
    raise AssertionError("there is always another name")


def reclaim_folder(folder: Path) -> FolderClaim:
    """Claim the folder of a run that goes on; FolderTakenError if another process is writing to it."""
    return _lock(folder)


def is_claimed_by_parent(folder: Path) -> bool:
    """Say whether the process that started this one holds the folder's lock for it."""
    return os.environ.get(CLAIMED) == str(folder.absolute())


def _lock(folder: Path, new_parents: Sequence[Path] = ()) -> FolderClaim:
    """Lock the folder itself, where the system and its file system have locks."""
    if os.name != "posix":
        return FolderClaim(folder, None, new_parents)
    from fcntl import LOCK_EX, LOCK_NB, flock

    taken = FolderTakenError(f"{folder}: another run is being written to it; name another folder, or wait for its end")
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise taken from None  # another process has released the empty folder in between
    try:
        flock(handle, LOCK_EX | LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return FolderClaim(folder, None, new_parents)
        raise taken from None
    if not folder.exists() or folder.stat().st_ino != os.fstat(handle).st_ino:
        os.close(handle)
        raise taken  # the lock is on a folder that has been removed
    return FolderClaim(folder, handle, new_parents)


def _holds_run(folder: Path) -> bool:
    """Whether a run has begun to record: it has a file of rounds, and a scenario once that can be read back.

    The file of rounds is the first that a run writes and the last that is removed, and is empty for a moment.
    """
    rounds = folder / ROUNDS
    return rounds.is_file() and ((folder / SCENARIO).is_file() or rounds.stat().st_size > 0)


def _has_only_leftovers(folder: Path) -> bool:
    """Whether a folder is empty but for what a run writes before its first line; a scenario alone is the user's."""
    names = [path.name for path in folder.iterdir()]
    return all(_belongs_to_run(name) for name in names) and names != [SCENARIO]


def _belongs_to_run(name: str) -> bool:
    """Whether a name is one that a run gives, or that of a file that was being written when a run was killed."""
    return name in (*FILES, *FOLDERS) or any(name.startswith(f".{file}-") for file in FILES)


def check_usable(folder: Path) -> None:
    """ValueError for a folder that holds something other than a run, or cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a run needs a folder")
    if folder.is_dir() and not _holds_run(folder) and not _has_only_leftovers(folder):
        raise ValueError(f"{folder}: is not empty and holds no run; name another folder, or empty this one")
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{folder}: cannot be made, for {above} is a file; name another folder")
    if not os.access(above, os.W_OK):
        raise ValueError(f"{folder}: cannot be made, for {above} may not be written to; name another folder")


def remove_run(folder: Path) -> None:
    """Remove what a run left in a folder, and nothing else; a link is removed, not followed."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == ROUNDS):
        if path.name in FOLDERS and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif _belongs_to_run(path.name):
            path.unlink()


# Reading a folder ----------------------------------------------------------------------------------------------------


def open_unfinished(folder: Path) -> tuple[Scenario, Checkpoint | None]:
    """Read the scenario of a run that goes on, and its latest whole checkpoint, None at its start; ValueError if it
    cannot go on. Checkpoints that are damaged are logged.
    """
    scenario = read_scenario(folder)
    refuse_all_links(folder)
    check_unfinished(folder)
    after = checkpoint.latest(folder)
    if after is None and not scenario.checkpoint.every:
        raise ValueError(f"{folder}: has no checkpoint to go on from, for its scenario has checkpoint.every = 0")
    if after is not None and after.round > scenario.rounds:
        raise ValueError(f"{after.folder}: its scenario has {scenario.rounds} rounds; this is no checkpoint of it")
    if after is None:
        return scenario, None
    if lost := find_lost_lines(folder, after.round):
        after = replace(after, passed_over=(*after.passed_over, lost))
    for line in after.passed_over:
        log.warning("%s; the run goes on from round %d", line, after.round)
    return scenario, after


def find_lost_lines(folder: Path, round: int) -> str | None:
    """Say which rounds before this one have no whole line in `rounds.jsonl`; None if all have one."""
    lines = read_lines(folder)
    lost = [number for number in range(1, round) if number not in lines]
    if not lost:
        return None
    rounds = f"round {lost[0]}" if len(lost) == 1 else f"{len(lost)} rounds from {lost[0]} on"
    return f"{folder / ROUNDS}: has no whole line of {rounds}, which figures, tables and MLflow may lack"


def read_lines(folder: Path) -> dict[int, str]:
    """Read the whole lines of `rounds.jsonl` by their rounds; none without the file."""
    try:
        text = (folder / ROUNDS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    lines: dict[int, str] = {}
    for line in text.split("\n")[:-1]:
        with suppress(ValueError):
            content = parse_json(line)
            number = content.get("round") if isinstance(content, dict) else None
            if isinstance(number, int):
                lines.setdefault(number, line)
    return lines


def check_unfinished(folder: Path) -> None:
    """ValueError for a run that has finished, or that a callback has stopped."""
    results = read_results(folder)
    if results is not None and results["status"] == "stopped":
        cure = f"go on with changes in a new folder: grpo-fed run --continue {folder}"
        raise ValueError(f"{folder}: was stopped by a callback: {results['reason']}; {cure}")
    if results is not None and results["status"] == "finished":
        raise ValueError(f"{folder}: has finished, there is nothing to go on with; start a new run to train longer")


def refuse_all_links(folder: Path) -> None:
    """ValueError if anything that a run writes in its folder is a symbolic link, which could lead out of it."""
    for name in (*FILES, *FOLDERS):
        refuse_links(folder, folder / name)
    for name in FOLDERS:
        for parent, folders, files in os.walk(folder / name):
            for entry in (*folders, *files):
                refuse_links(Path(parent), Path(parent, entry))


def read_scenario(folder: Path) -> Scenario:
    """Read the scenario of a run's folder; ValueError if it is none.

    From then on no module can be imported from the folder, which another may have made.
    """
    if not (folder / SCENARIO).is_file():
        beside = [path.parent.name for path in folder.parent.glob(f"*/{SCENARIO}")]
        close = closest_match(folder.name, beside)
        cure = did_you_mean(str(folder.parent / close) if close else None)
        what = f"there is no {SCENARIO} in it" if folder.exists() else "there is no such folder"
        raise ValueError(f"{folder}: no run folder: {what}{cure}")
    refuse_links(folder, folder / SCENARIO)
    refuse_imports_from(folder)
    return Scenario.load(folder / SCENARIO)


def read_client_names(folder: str | Path) -> list[str]:
    """Read the names of a run's clients, in the scenario's order."""
    return [name for settings in read_scenario(Path(folder)).clients for name in settings.names]


def write_engine_state(folder: Path | None, engine: Mapping[str, Any]) -> None:
    """Write what an engine needs again if the run is stopped before its first checkpoint."""
    if folder is not None and engine:
        write_atomic(folder / ENGINE, json.dumps(engine) + "\n")


def read_engine_state(folder: Path) -> dict[str, Any]:
    """Read what `write_engine_state` wrote; empty if the run was stopped before; ValueError if it is damaged."""
    path = folder / ENGINE
    if not path.is_file():
        return {}
    refuse_links(folder, path)
    try:
        return from_json(dict[str, Any], read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}; start the run again with --out and --replace") from None


def read_shared_names(folder: Path) -> SharedNames | None:
    """Read the names of the shared blocks and of their parameter groups; None if the run has not written them.

    ValueError if the file is damaged.
    """
    path = folder / SHARED
    if not path.is_file():
        return None
    refuse_links(folder, path)
    try:
        return SharedNames.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(
            f"{path}: is damaged: {error}; remove it: groups are then named as the rounds name them"
        ) from None
