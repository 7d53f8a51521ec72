"""What a run leaves behind: a folder with its scenario, a line for each round, its policies and its results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np

from grpo_fed import checkpoint
from grpo_fed.files import add_line, write_whole
from grpo_fed.fleet import Fleet, Report
from grpo_fed.play import Evaluation
from grpo_fed.saved import POLICIES, SCENARIO, save_policy
from grpo_fed.scenario import Scenario

ROUNDS = "rounds.jsonl"
RESULTS = "results.json"
FAILURE = "failure.txt"
"""Where the command line writes what stopped a run."""

Status: TypeAlias = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class RoundNote:
    """What happened in a round."""

    round: int
    """From 1; 0 is what there was before."""
    rounds: int
    """How many there will be."""
    seconds: float
    """Of this round's training."""
    env_steps: int
    """Of all clients, since the start."""
    reports: Sequence[Report]
    """Of every client that trained."""
    evaluations: Sequence[Evaluation]
    """With deterministic actions; empty where this round had none."""


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

    def document(self) -> dict[str, Any]:
        """As `results.json` has it."""
        return {
            "scenario": self.scenario,
            "method": "local",
            "seed": self.seed,
            "device": self.device,
            "status": self.status,
            **({} if self.error is None else {"error": self.error}),
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
            "env_steps": self.env_steps,
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
                }
                for name, client in self.clients.items()
            },
        }


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of [K] scores."""
    cut = len(scores) // 4
    return float(np.sort(scores)[cut : len(scores) - cut].mean())


# A line of rounds.jsonl ----------------------------------------------------------------------------------------------


def line_of(note: RoundNote) -> dict[str, Any]:
    """A round's metrics for the whole, and under the same names for each client; null where there is no number."""
    scores = {evaluation.client: evaluation.score for evaluation in note.evaluations}
    clients = {report.client: _metrics(report, scores.get(report.client)) for report in note.reports}
    line = {
        "round": note.round,
        "global_step": note.env_steps,
        "time/round_s": round(note.seconds, 4),
        "charts/SPS": _number(sum(report.steps for report in note.reports) / max(note.seconds, 1e-9)),
    }
    returns = np.array(list(scores.values()))
    line["eval/score_iqm"] = interquartile_mean(returns) if scores else None
    line["eval/score_min"] = float(returns.min()) if scores else None
    names = dict.fromkeys(name for metrics in clients.values() for name in metrics)
    line |= {name: _mean([metrics[name] for metrics in clients.values() if name in metrics]) for name in names}
    return {**line, "clients": clients}


def _metrics(report: Report, score: float | None) -> dict[str, float | None]:
    """One client's, under the names that they have everywhere."""
    episodes = report.episodes
    return {
        "eval/episodic_return": score,
        "charts/episodic_return": mean_return(report),
        "charts/episodic_length": _mean([episode.length for episode in episodes]),
        "charts/episodes": len(episodes),
        **{f"losses/{name}": _number(value) for name, value in report.losses.items()},
    }


def mean_return(report: Report) -> float | None:
    """Of the episodes that a client finished in a round; None if there was none."""
    return _mean([episode.score for episode in report.episodes])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _number(float(np.mean(known))) if known else None


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None


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
        """A line for a round that trained."""
        if self.folder is not None and note.round > 0:
            add_line(self.folder / ROUNDS, json.dumps(line_of(note), allow_nan=False))

    def close(self, result: Result, fleets: Sequence[Fleet]) -> None:
        """The policies, but for those that diverged, and last the results, so that who finds these finds all."""
        if self.folder is None:
            return
        for fleet in fleets:
            for client, parameters in enumerate(fleet.parameters):
                if bool(parameters.isfinite().all()):
                    normaliser = fleet.observation_normaliser
                    moments = None if normaliser is None else normaliser.state(client)
                    save_policy(self.folder, fleet.tasks[client], fleet.policy, parameters, moments)
        document = json.dumps(result.document(), indent=2, allow_nan=False)
        write_whole(self.folder / RESULTS, document + "\n")


def refuse_finished(folder: Path) -> None:
    """ValueError for a run that came to its end."""
    results = folder / RESULTS
    if results.is_file() and json.loads(results.read_text(encoding="utf-8"))["status"] == "finished":
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
