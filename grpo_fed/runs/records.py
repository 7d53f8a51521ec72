"""What happened in a round, as displays, files and trackers hear of it: records, and the line that they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep

MB = 1e6
RETURN, LENGTH = "charts/episodic_return", "charts/episodic_length"


@dataclass(frozen=True)
class ClientRecord:
    """A client in a round."""

    client: str
    task: str
    """The name of the scenario's entry that it is of."""
    steps: int = 0
    """Environment steps that it learned from; 0 if it did not train, or nobody heard of it."""
    episodes: int = 0
    """Training episodes that finished."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of its training, under the names that they have everywhere."""
    score: float | None = None
    """Mean return of the episodes played after the round with deterministic actions; None where it played none."""
    kl: float | None = None
    """Of the server's step, on this client's own states; None where it did not measure it."""
    departed: tuple[str, ...] = ()
    """The groups that it has left, in order."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """By block the cluster that it is in, 0 being that of most weight; empty where the merge makes none."""
    failure: Failure | None = None
    """The first of this round."""

    @property
    def mean(self) -> float | None:
        """Return of its training episodes; None if there was none."""
        return self.metrics.get(RETURN)


@dataclass(frozen=True)
class ServerRecord:
    """The server in a round."""

    step: AcceptedStep | None
    """What became of the step; None in a round without a merge."""
    last_kl: Mapping[str, float]
    """KL of the last round's step as clients found it only now: `joint`, and each block alone; empty if unknown."""
    bytes_up: int
    """Bytes that came from clients since the last round."""
    bytes_down: int
    """Bytes that went to them."""
    bytes_total: int
    """Both, since the run began."""
    notes: tuple[str, ...] = ()
    """What a person should know."""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round."""

    round: int
    """From 1; 0 is what there was before."""
    rounds: int
    """How many there will be."""
    seconds: float
    """Of this round's training, and of the server's step."""
    env_steps: int
    """Of all clients, since the start."""
    clients: Sequence[ClientRecord]
    """Every client that there is anything to say of."""
    server: ServerRecord | None = None
    """None where there is no federation."""

    @property
    def steps(self) -> int:
        """Of all clients, in this round."""
        return sum(note.steps for note in self.clients)

    @property
    def returns(self) -> dict[str, float]:
        """By client, the mean return of its training episodes."""
        return {note.client: note.mean for note in self.clients if note.mean is not None}

    @property
    def scores(self) -> dict[str, float]:
        """By client, the mean return of the episodes played after the round; empty where this round had none."""
        return {note.client: note.score for note in self.clients if note.score is not None}


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of [K] scores (2108.13264)."""
    cut = len(scores) // 4
    return float(np.sort(scores)[cut : len(scores) - cut].mean())


def list_differences(personal: Sequence[str], clusters: Mapping[str, int]) -> list[str]:
    """What a client has apart from most others: groups of its own, and blocks that it shares in another cluster than 0,
    which is that of most weight.
    """
    return [*personal, *(f"{block} #{number}" for block, number in clusters.items() if number)]


# A line of rounds.jsonl ----------------------------------------------------------------------------------------------


def record_to_line(note: RoundRecord) -> dict[str, Any]:
    """A round's metrics for the whole, and under the same names for each client; null where there is no number."""
    clients = {one.client: _metrics(one) for one in note.clients}
    scores = np.array(list(note.scores.values()))
    names = dict.fromkeys(name for metrics in clients.values() for name in metrics)
    return {
        "round": note.round,
        "global_step": note.env_steps,
        "time/round_s": round(note.seconds, 4),
        "charts/SPS": _number(note.steps / max(note.seconds, 1e-9)),
        "eval/score_iqm": interquartile_mean(scores) if scores.size else None,
        "eval/score_min": float(scores.min()) if scores.size else None,
        **{name: _mean(metrics.get(name) for metrics in clients.values()) for name in names},
        **_tasks(note),
        **({} if note.server is None else _server_metrics(note.server, note.clients)),
        "clients": clients if note.server is None else {one.client: _client_line(one, clients) for one in note.clients},
    }


def _metrics(note: ClientRecord) -> dict[str, float | None]:
    """A client's own."""
    score = {"eval/episodic_return": note.score}
    if not note.steps:
        return score
    learned = {RETURN: None, LENGTH: None, "charts/episodes": note.episodes, **note.metrics}
    return {**score, **{name: _number(value) for name, value in learned.items()}}


def _tasks(note: RoundRecord) -> dict[str, float | None]:
    """For every entry of the scenario that has played, the mean over its clients."""
    scores: dict[str, list[float]] = {}
    for one in note.clients:
        if one.score is not None:
            scores.setdefault(one.task, []).append(one.score)
    return {f"task/{task}": _mean(own) for task, own in scores.items()}


def _server_metrics(server: ServerRecord, clients: Sequence[ClientRecord]) -> dict[str, Any]:
    """What the server did."""
    line: dict[str, Any] = {
        "fed/clients_ok": sum(one.steps > 0 and one.failure is None for one in clients),
        "fed/clients_failed": sum(one.failure is not None for one in clients),
        "fed/personal_groups": sum(len(one.departed) for one in clients),
        "comm/MB_up": server.bytes_up / MB,
        "comm/MB_down": server.bytes_down / MB,
        "comm/MB_total": server.bytes_total / MB,
    }
    for name in dict.fromkeys(name for one in clients for name in one.clusters):
        line[f"clusters/{name}"] = len({one.clusters[name] for one in clients if one.clusters})
    blocks = () if server.step is None else server.step.blocks
    for block in blocks:
        line |= {
            f"kl/{block.block}": _number(block.kl),
            f"alpha/{block.block}": block.alpha,
            f"budget/{block.block}": _number(block.budget),
            f"wanted/{block.block}": _number(block.wanted),
        }
    if server.step is not None and blocks:
        kept = server.step
        line |= {"kl/joint": _number(kept.joint), "budget/joint": _number(kept.joint_budget)}
        line |= {"wanted/joint": _number(kept.joint_wanted)}
    line |= {f"last_kl/{name}": _number(kl) for name, kl in server.last_kl.items()}
    return line | ({"notes": list(server.notes)} if server.notes else {})


def _client_line(note: ClientRecord, metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """A client's line in a federation."""
    line: dict[str, Any] = {**metrics[note.client], "fed/personal_groups": len(note.departed)}
    line |= {"personal_groups": list(note.departed)} if note.departed else {}
    line |= {f"cluster/{block}": cluster for block, cluster in note.clusters.items()}
    line |= {"kl/joint": _number(note.kl)} if note.kl is not None else {}
    return line | ({"failure": note.failure.kind} if note.failure is not None else {})


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _number(float(np.mean(known))) if known else None


def _number(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return None if value is None or not np.isfinite(value) else value


# To a checkpoint and back ---------------------------------------------------------------------------------------------


def note_of(document: Mapping[str, Any]) -> RoundRecord:
    """A note from what JSON made of it."""
    server = document["server"]
    return RoundRecord(
        **{
            **document,
            "clients": [_client_of(one) for one in document["clients"]],
            "server": None if server is None else _server_of(server),
        }
    )


def kept_of(document: Mapping[str, Any] | None) -> AcceptedStep | None:
    """A step from what JSON made of it."""
    if document is None:
        return None
    blocks = tuple(AcceptedBlock(**block) for block in document["blocks"])
    return AcceptedStep(**{**document, "blocks": blocks, "clients": tuple(document["clients"])})


def _client_of(document: Mapping[str, Any]) -> ClientRecord:
    failure = document["failure"]
    known = {"departed": tuple(document["departed"]), "failure": None if failure is None else Failure(**failure)}
    return ClientRecord(**{**document, **known})


def _server_of(document: Mapping[str, Any]) -> ServerRecord:
    return ServerRecord(**{**document, "step": kept_of(document["step"]), "notes": tuple(document["notes"])})


@dataclass(frozen=True)
class Failure:
    """Why a client has no answer."""

    kind: str
    """`raised`, `died`, `late`, `refused` or `unreachable`."""
    reason: str
    """In words, of one line."""
