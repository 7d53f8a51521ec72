"""`results.json`: what became of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from grpo_fed.runs.records import interquartile_mean
from grpo_fed.scenario.toml.text import shorten

RESULTS = "results.json"

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
        return idle_clients(self.document())

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


def read_results(folder: Path) -> dict[str, Any] | None:
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
        raise ValueError(f"{path}: is damaged: {shorten(str(error))}; {cure}") from None
    return found


def idle_clients(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Of `results.json`, the clients that were asked to train and learned nothing; none where nobody was asked yet."""
    clients, missing = results["clients"], results.get("missing", {})
    if not results["rounds"]:
        return ()
    return tuple(name for name in missing if name in clients and not clients[name].get("env_steps"))
