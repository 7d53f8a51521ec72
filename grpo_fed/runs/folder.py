"""What a run leaves behind: a folder with its scenario, a line for each round, its policies and its results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np

from grpo_fed.runs import checkpoint
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.files import add_line, write_whole
from grpo_fed.runs.idle import idle_in
from grpo_fed.runs.policies import POLICIES, SCENARIO, scenario_of
from grpo_fed.runs.records import RoundNote, interquartile_mean, line_of
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml import text as words

ROUNDS = "rounds.jsonl"
RESULTS = "results.json"
ENGINE = "engine.json"
"""What the engine was begun with."""
FAILURE = "failure.txt"
"""Where the command line writes what stopped a run."""

SHAPE: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("scenario", "method", "device", "status"), str),
    **dict.fromkeys(("seed", "rounds", "env_steps", "bytes_up", "bytes_down"), int),
    "seconds": (int, float),
    **dict.fromkeys(("eval", "clients"), dict),
}
"""What is in `results.json` at the least."""

Status: TypeAlias = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class ClientResult:
    """What became of a client; a mean return is None where none was measured."""

    env: str
    before: float | None
    """Mean return of the first policy, deterministic actions."""
    after: float | None
    """Mean return of the last policy, deterministic actions."""
    sampled: float | None
    """Mean return of the last policy, sampled actions."""
    best: float | None
    """Highest mean return of a round's training episodes."""
    episodes: int
    """Training episodes that finished."""
    env_steps: int
    """Training steps."""
    personal_groups: tuple[str, ...] = ()
    """Of the shared blocks, the groups that it has left at the end."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """By shared block the cluster that it is in at the end; empty where the merge makes none."""

    @property
    def latest(self) -> float | None:
        """What is known of how it does: the last policy's return, or else the best that a round had."""
        return self.best if self.after is None else self.after


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    scenario: str
    seed: int
    device: str
    status: Status
    error: str | None
    """What stopped it."""
    rounds: int
    """How many were trained."""
    seconds: float
    env_steps: int
    clients: dict[str, ClientResult]
    """In the scenario's order."""
    out: Path | None
    """The run folder."""
    method: str = "local"
    bytes_up: int = 0
    """From clients to the server."""
    bytes_down: int = 0
    """From the server to clients."""
    missing: Mapping[str, Sequence[tuple[int, str, str]]] = field(default_factory=dict)
    """By client, when it had no answer: the round, the kind of failure and what is known of it."""

    @property
    def returns(self) -> np.ndarray:
        """[K]: the last policies' mean returns, of the clients that have one."""
        return np.array([client.after for client in self.clients.values() if client.after is not None])

    @property
    def score_mean(self) -> float | None:
        """Mean over the clients."""
        return float(self.returns.mean()) if self.returns.size else None

    @property
    def score_min(self) -> float | None:
        """Of the worst client."""
        return float(self.returns.min()) if self.returns.size else None

    @property
    def score_iqm(self) -> float | None:
        """Mean over the middle half of the clients (2108.13264)."""
        return interquartile_mean(self.returns) if self.returns.size else None

    @property
    def idle(self) -> tuple[str, ...]:
        """Clients that were asked and learned nothing."""
        return idle_in(self.document())

    def document(self) -> dict[str, Any]:
        """As `results.json` has it."""
        return {
            "scenario": self.scenario,
            "method": self.method,
            "seed": self.seed,
            "device": self.device,
            "status": self.status,
            **({} if self.error is None else {"error": self.error}),
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
            "env_steps": self.env_steps,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "eval": {"score_iqm": self.score_iqm, "score_mean": self.score_mean, "score_min": self.score_min},
            "clients": {
                name: {
                    "env": client.env,
                    "return": client.after,
                    "return_before": client.before,
                    "return_sampled": client.sampled,
                    "return_best": client.best,
                    "episodes": client.episodes,
                    "env_steps": client.env_steps,
                    "personal_groups": list(client.personal_groups),
                    **({"clusters": dict(client.clusters)} if client.clusters else {}),
                }
                for name, client in self.clients.items()
            },
            "missing": {name: [list(one) for one in every] for name, every in self.missing.items()},
        }


# The folder ----------------------------------------------------------------------------------------------------------


@final
class Journal:
    """The run folder while it is written; without a folder, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path | None, scenario: Scenario) -> Journal:
        """Make the folder; a run that was there goes."""
        if folder is not None:
            refuse_unusable(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for old in [folder / RESULTS, folder / FAILURE, *(folder / POLICIES).glob("*.safetensors")]:
                old.unlink(missing_ok=True)
            checkpoint.remove(folder)
            write_whole(folder / ROUNDS, "")
            write_whole(folder / SCENARIO, scenario.dumps())
        return cls(folder)

    @classmethod
    def reopen(cls, folder: Path | None, rounds: int) -> Journal:
        """Go on after so many rounds; lines of later ones, which are trained again, go."""
        if folder is not None:
            (folder / RESULTS).unlink(missing_ok=True)
            (folder / FAILURE).unlink(missing_ok=True)
            lines = (folder / ROUNDS).read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(folder / ROUNDS, "".join(lines[:rounds]))
        return cls(folder)

    def write(self, note: RoundNote) -> None:
        """A line for a round that trained, on the disk before the round's checkpoint is."""
        if self.folder is not None and note.round > 0:
            add_line(self.folder / ROUNDS, json.dumps(line_of(note), allow_nan=False), durable=True)

    def close(self, result: Result) -> None:
        """The results, last of all, so that who finds these finds all."""
        if self.folder is not None:
            document = json.dumps(result.document(), indent=2, allow_nan=False)
            write_whole(self.folder / RESULTS, document + "\n")


def unfinished(folder: Path) -> tuple[Scenario, Checkpoint | None]:
    """The run that a folder holds and where it stands, None at its start; ValueError if that is nowhere."""
    scenario = scenario_of(folder)
    refuse_finished(folder)
    after = checkpoint.latest(folder)
    if after is None and not scenario.checkpoint.every:
        raise ValueError(f"{folder}: has no checkpoint to go on from, for its scenario has checkpoint.every = 0")
    return scenario, after


def status_of(error: BaseException | None) -> Status:
    """How a run ended that this stopped."""
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def note_engine(folder: Path | None, engine: Mapping[str, Any]) -> None:
    """What an engine wants to find again although a run was stopped before its first checkpoint."""
    if folder is not None and engine:
        write_whole(folder / ENGINE, json.dumps(engine) + "\n")


def engine_of(folder: Path) -> dict[str, Any]:
    """What `note_engine` wrote; nothing if it did not come to that."""
    path = folder / ENGINE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def results_of(folder: Path) -> dict[str, Any] | None:
    """`results.json` of a run folder; None while there is none; ValueError if it is damaged."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no table of results")
        for key, kinds in SHAPE.items():
            if not isinstance(found.get(key), kinds):
                raise ValueError(f"{key} is {found[key]!r}" if key in found else f"it has no {key}")
        if not isinstance(found.get("missing", {}), dict):
            raise ValueError(f"missing is {found['missing']!r}")
        if not all(isinstance(one, dict) for one in found["clients"].values()):
            raise ValueError("clients are not tables")
    except ValueError as error:
        cure = "remove it: what the rounds tell is there without it, and a run that goes on writes it anew"
        raise ValueError(f"{path}: is damaged: {words.shorten(str(error))}; {cure}") from None
    return found


def refuse_finished(folder: Path) -> None:
    """ValueError for a run that came to its end."""
    results = results_of(folder)
    if results is not None and results["status"] == "finished":
        raise ValueError(f"{folder}: has finished, and there is nothing to go on with; train anew to train longer")


def refuse_unusable(folder: Path) -> None:
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
