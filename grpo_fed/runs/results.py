"""The results of a run, and the file `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from grpo_fed.runs.departures import Departure
from grpo_fed.runs.files import refuse_links
from grpo_fed.runs.mean_returns import MeanReturns, normalised_returns, returns_by_environment
from grpo_fed.runs.privacy import PrivacyCost
from grpo_fed.runs.serialisation import from_json, read_json
from grpo_fed.runs.sharing_verdicts import SharingVerdict
from grpo_fed.scenario.toml.text import shorten
from grpo_fed.tasks.scores import ReturnScale

RESULTS = "results.json"

CLIENT_KEYS = {"before": "return_before", "after": "return", "sampled": "return_sampled", "best": "return_best"}
"""A client's keys in `results.json` that differ from the names of the record's fields."""

Status: TypeAlias = Literal["finished", "stopped", "interrupted", "failed"]
ENDED = frozenset({"finished", "stopped"})
"""What a run has come to that has nothing left to do: all rounds, or an end that a callback has chosen."""


@dataclass(frozen=True)
class ClientResult:
    """Holds a client's results; a mean return is None if it was not measured."""

    env: str
    """The name of its environment."""
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
    """Environment steps that it learned from."""
    personal_groups: tuple[str, ...] = ()
    """The shared parameter groups that it has left by the end."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """Its cluster in every shared block at the end; empty if the merge makes no clusters."""
    departures: Mapping[str, Departure] = field(default_factory=dict)
    """With the merge rule `persistence`, when and why it left each of its personal groups."""
    unit: str = "steps"
    """What `env_steps` counts: `steps` of an environment, or `completions` of prompts."""
    adapted_first: tuple[float, ...] = ()
    """With `evaluate.adapt`, mean returns of the first policy after so many local updates, from 0."""
    adapted_last: tuple[float, ...] = ()
    """The same of the last policy."""
    trains: bool = True
    """Whether it took part in training; otherwise its `after` is that of the shared policy, and counts in no score."""
    joined: int = 0
    """The round in which it joined a run that had ended or a running deployment; 0 if the run began with it."""
    sharing: SharingVerdict | None = None
    """With `evaluate.twins`, whether sharing paid for it; None without a comparison."""
    scale: ReturnScale | None = None
    """What its returns are of and are normalised by, in a run of unlike environments; None where all have one scale."""
    cost: float | None = None
    """Mean cost of the last policy's episodes, deterministic actions; None where costs have no limit."""

    @property
    def latest(self) -> float | None:
        """The last policy's return, or else the highest return of a round's training episodes."""
        return self.best if self.after is None else self.after

    @property
    def rank(self) -> float | None:
        """What clients of a run are ranked by: the latest return, normalised where environments are unlike."""
        if self.latest is None or self.scale is None or not self.scale.is_known:
            return self.latest
        return self.scale.normalise(self.latest)


@dataclass(frozen=True)
class SiteResult:
    """Holds what a site shares at the end."""

    clients: tuple[str, ...]
    """The names of its clients."""
    personal_groups: tuple[str, ...] = ()
    """The shared parameter groups that it has left: its clients share the site's own there."""
    departures: Mapping[str, Departure] = field(default_factory=dict)
    """With the merge rule `persistence`, when and why it left each of them."""


@dataclass(frozen=True)
class Result:
    """Holds the results of a run."""

    scenario: str
    """The scenario's name."""
    seed: int
    device: str
    status: Status
    error: str | None
    """The exception that ended the run; None if none did."""
    rounds: int
    """How many rounds were trained."""
    seconds: float
    env_steps: int
    """Environment steps of all clients."""
    clients: Mapping[str, ClientResult]
    """In the scenario's order."""
    out: Path | None
    """The run's folder."""
    method: str = "local"
    """The method that the clients share by; `local` without a federation."""
    bytes_up: int = 0
    """Bytes from clients to the server."""
    bytes_down: int = 0
    """Bytes from the server to clients."""
    comparison_episodes: int = 0
    """Episodes that clients played to compare their own parameters with the shared ones; not learned from."""
    missing: Mapping[str, Sequence[tuple[int, str, str]]] = field(default_factory=dict)
    """For each client that failed: round, kind of failure and reason, one for each time."""
    equal: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The rounds in which clients could learn nothing, since every group of their completions was rewarded equally."""
    sites: Mapping[str, SiteResult] = field(default_factory=dict)
    """What each site shares; empty where the server merges all clients."""
    notes: Sequence[str] = ()
    """Messages for a person: damaged checkpoints that were passed over, policies that could not be saved."""
    reason: str | None = None
    """Why a callback stopped the run; None if none did."""

    privacy: PrivacyCost | None = None
    """With a privacy budget, what was spent of it."""

    @property
    def unit(self) -> str:
        """What `env_steps` counts: `completions` if all clients have prompts, else `steps`."""
        return "completions" if all(client.unit == "completions" for client in self.clients.values()) else "steps"

    @property
    def returns(self) -> np.ndarray:
        """[K]: mean returns of the last policies, for the clients that train and whose last policy was evaluated."""
        trained = [client.after for client in self.clients.values() if client.trains]
        return np.array([after for after in trained if after is not None])

    @property
    def score_mean(self) -> float | None:
        """Mean return over the clients; None if no last policy was evaluated, or if environments are unlike."""
        scores = _scores_of(self)
        return None if scores is None else scores.mean

    @property
    def score_min(self) -> float | None:
        """Return of the worst client; None as for `score_mean`."""
        scores = _scores_of(self)
        return None if scores is None else scores.min

    @property
    def score_iqm(self) -> float | None:
        """Interquartile mean of the clients' returns (2108.13264); None as for `score_mean`."""
        scores = _scores_of(self)
        return None if scores is None else scores.iqm

    @property
    def normalised(self) -> MeanReturns | None:
        """Normalised scores of unlike environments, 0 for random actions and 1 for a reference; None if some client's
        is not known, or if all clients have one environment.
        """
        scales = [client.scale for client in self.clients.values() if client.scale is not None]
        return MeanReturns.of(normalised_returns(_scaled_returns(self), scales))

    @property
    def by_environment(self) -> dict[str, MeanReturns]:
        """Returns of unlike environments, each by itself; empty if all clients have one."""
        grouped = {
            label: MeanReturns.of(values) for label, values in returns_by_environment(_scaled_returns(self)).items()
        }
        return {label: found for label, found in grouped.items() if found is not None}

    @property
    def is_mixed(self) -> bool:
        """Whether clients have unlike environments, whose returns have no common mean."""
        return any(client.scale is not None for client in self.clients.values())

    @property
    def costs(self) -> dict[str, float]:
        """What an episode of the last policies costs, by client, for those that train; empty without a limit."""
        return {name: each.cost for name, each in self.clients.items() if each.trains and each.cost is not None}

    @property
    def idle(self) -> tuple[str, ...]:
        """Clients that were asked to train and learned nothing."""
        return idle_clients(self.to_json())

    def to_pandas(self, by: Literal["round", "client"] = "round") -> Any:
        """Read the run's folder as a table of pandas; ValueError if the run has no folder.

        by: `round` for a row for each client and round, `client` for a row for each client.
        """
        if self.out is None:
            raise ValueError("the run has no folder to read its rounds from: give it one with out=")
        # by name, since what reads a folder imports this module
        return import_module("grpo_fed.runs.csv_tables").read_pandas(self.out, by)

    def to_json(self) -> dict[str, Any]:
        """Make the content of `results.json`."""
        return {
            "scenario": self.scenario,
            "method": self.method,
            "seed": self.seed,
            "device": self.device,
            "status": self.status,
            **({} if self.error is None else {"error": self.error}),
            **({} if self.reason is None else {"reason": self.reason}),
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
            "env_steps": self.env_steps,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "comparison_episodes": self.comparison_episodes,
            "eval": _scores_to_json(self),
            "clients": {name: _client_to_json(client) for name, client in self.clients.items()},
            "missing": {name: [list(failure) for failure in failures] for name, failures in self.missing.items()},
            **({"sites": {name: _site_to_json(site) for name, site in self.sites.items()}} if self.sites else {}),
            **({"equal": {name: list(rounds) for name, rounds in self.equal.items()}} if self.equal else {}),
            **({"privacy": vars(self.privacy)} if self.privacy is not None else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], out: Path | None = None) -> Result:
        """Read the content of `results.json`; ValueError names what does not fit."""
        tables = dict(document)
        scores = tables.pop("eval", None)
        fields = {key: field for field, key in CLIENT_KEYS.items()}
        clients = tables.get("clients")
        if isinstance(clients, Mapping) and all(isinstance(client, Mapping) for client in clients.values()):
            tables["clients"] = {
                name: {fields.get(key, key): value for key, value in client.items()} for name, client in clients.items()
            }
        result = from_json(cls, {"error": None, **tables, "out": None})
        if not isinstance(scores, Mapping):
            raise ValueError("it has no eval")
        return replace(result, out=out)


def _scores_of(result: Result) -> MeanReturns | None:
    """Summarise the returns of clients with one environment."""
    return None if result.is_mixed else MeanReturns.of(result.returns.tolist())


def _scaled_returns(result: Result) -> list[tuple[ReturnScale, float]]:
    """List the last policies' returns with their scales, in a run of unlike environments."""
    trained = [client for client in result.clients.values() if client.trains]
    return [(each.scale, each.after) for each in trained if each.scale is not None and each.after is not None]


def _scores_to_json(result: Result) -> dict[str, Any]:
    """Make the part of `results.json` that summarises the clients' returns."""
    scores: dict[str, Any] = {
        "score_iqm": result.score_iqm,
        "score_mean": result.score_mean,
        "score_min": result.score_min,
    }
    if not result.is_mixed:
        return scores
    found = result.normalised
    scores |= {f"normalised_{key}": None if found is None else getattr(found, key) for key in ("iqm", "mean", "min")}
    return scores | {"by_environment": {label: vars(means) for label, means in result.by_environment.items()}}


def _site_to_json(site: SiteResult) -> dict[str, Any]:
    """Make a site's part of `results.json`."""
    document = {"clients": list(site.clients), "personal_groups": list(site.personal_groups)}
    return document | ({"departures": _departures_to_json(site.departures)} if site.departures else {})


def _departures_to_json(departures: Mapping[str, Departure]) -> dict[str, Any]:
    return {
        group: {"round": departure.round, "rho": round(departure.rho, 4)} for group, departure in departures.items()
    }


def _client_to_json(client: ClientResult) -> dict[str, Any]:
    """Make a client's part of `results.json`."""
    document = {CLIENT_KEYS.get(name, name): value for name, value in vars(client).items()}
    document["personal_groups"] = list(client.personal_groups)
    document["clusters"] = dict(client.clusters)
    document["departures"] = _departures_to_json(client.departures)
    for key in ("adapted_first", "adapted_last"):
        document[key] = list(document[key])
    for key in ("clusters", "departures", "adapted_first", "adapted_last"):
        if not document[key]:
            del document[key]
    if client.cost is None:
        del document["cost"]
    if client.unit == "steps":
        del document["unit"]
    if client.trains:
        del document["trains"]
    if not client.joined:
        del document["joined"]
    for key in ("sharing", "scale"):
        part = document.pop(key)
        if part is not None:
            document[key] = vars(part)
    return document


def status_of(error: BaseException | None, reason: str | None = None) -> Status:
    """Name how a run ended, from the exception that ended it, or the reason of a callback that stopped it."""
    if error is None:
        return "finished" if reason is None else "stopped"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read `results.json` of a run's folder; None if there is none yet; ValueError if it is damaged."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    refuse_links(folder, path)
    try:
        document = read_json(path)
        if not isinstance(document, dict):
            raise ValueError("it is no table of results")
        return Result.from_json(document).to_json()
    except ValueError as error:
        cure = "remove it: the rounds can be read without it, and a resumed run writes it again"
        raise ValueError(f"{path}: is damaged: {shorten(str(error))}; {cure}") from None


def idle_clients(results: Mapping[str, Any]) -> tuple[str, ...]:
    """List the clients that were asked to train and learned nothing; none before the first round.

    results: the content of `results.json`.
    """
    clients, missing = results["clients"], results.get("missing", {})
    if not results["rounds"]:
        return ()
    trained = [name for name, client in clients.items() if client.get("trains", True)]
    return tuple(name for name in missing if name in trained and not clients[name].get("env_steps"))


def mean_adaptation(results: Mapping[str, Any], last: bool = True) -> tuple[int, tuple[float, ...]]:
    """Average the returns before and after each local update over the clients whose adaptation counts.

    These are the clients that take no part in training, or all if there are none. Return how many clients have such
    returns, and the mean curve from 0 updates; empty if none has, or if their environments are unlike.

    results: the content of `results.json`. last: of the last policy, otherwise of the first.
    """
    clients = list(results["clients"].values())
    counted = [client for client in clients if not client.get("trains", True)] or clients
    key = "adapted_last" if last else "adapted_first"
    curves = [client[key] for client in counted if client.get(key)]
    if len({client.get("scale", {}).get("label") for client in counted}) > 1:
        return len(curves), ()
    return len(curves), tuple(np.mean(curves, axis=0).tolist()) if curves else ()
