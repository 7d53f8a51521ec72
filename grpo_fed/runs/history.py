"""A run as arrays by round and client, read from its folder; the run may be going on, stopped or finished.

K clients in the scenario's order, R rounds, G parameter groups of the shared blocks. Unknown numbers are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from grpo_fed.runs.departures import Departure, note_departures
from grpo_fed.runs.folder import ROUNDS, read_scenario, read_shared_names, refuse_all_links
from grpo_fed.runs.metrics import (
    ADAPTATION,
    CLIENTS_OK,
    EQUAL_GROUPS,
    LEFT,
    RETURNED,
    SITES,
    TEXTS,
    TRAINING_EPISODES,
    TRAINING_RETURN,
)
from grpo_fed.runs.results import read_results
from grpo_fed.runs.serialisation import parse_json
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.sites import clients_of_sites
from grpo_fed.scenario.toml.text import shorten


@dataclass(frozen=True)
class MissedRound:
    """Describes a round in which a client gave no valid answer."""

    round: int
    """The round's number."""
    kind: str
    """The kind of failure, as in `records.Failure`."""
    reason: str
    """The reason in words; empty if the run has not finished."""


@dataclass(frozen=True)
class GroupMove:
    """Describes that a client left a parameter group or returned to it."""

    round: int
    """The round's number."""
    client: int
    """The client's index in `History.clients`."""
    group: str
    """The group's name."""
    left: bool
    """Whether it left; otherwise it returned."""
    evidence: float
    """The rho for which it left, or the gain for which it returned."""


@dataclass(frozen=True, eq=False)
class History:
    """Reads a run's numbers from its folder."""

    folder: Path
    """The run's folder."""
    scenario: Scenario
    """The run's scenario."""
    lines: Sequence[Mapping[str, Any]]
    """[R]: the lines of `rounds.jsonl`."""
    results: Mapping[str, Any] | None
    """The content of `results.json`; None if there is none yet."""
    axis: Literal["rounds", "steps", "bytes"] = "rounds"
    """What the horizontal axis of its figures counts."""

    @property
    def status(self) -> str:
        """The status in the results, or `unfinished`."""
        return "unfinished" if self.results is None else str(self.results["status"])

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """[K]: the clients' names."""
        return tuple(name for settings in self.scenario.clients for name in settings.names)

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """[K]: the name of the scenario's entry that each client belongs to."""
        return tuple(settings.name for settings in self.scenario.clients for _ in settings.names)

    @cached_property
    def envs(self) -> tuple[str, ...]:
        """[K]: the clients' environments."""
        return tuple(settings.task for settings in self.scenario.clients for _ in settings.names)

    @cached_property
    def rounds(self) -> np.ndarray:
        """[R] int64: the rounds' numbers."""
        return np.array([line["round"] for line in self.lines], np.int64)

    @cached_property
    def federated(self) -> bool:
        """Whether the clients learned in a federation."""
        return any(CLIENTS_OK in line for line in self.lines)

    def server_series(self, key: str) -> np.ndarray:
        """Return a metric of the whole federation, [R]."""
        return np.array([_number(line.get(key)) for line in self.lines], np.float64)

    def client_series(self, key: str) -> np.ndarray:
        """Return a metric of every client, [R, K]."""
        rows = [[_number(line["clients"].get(name, {}).get(key)) for name in self.clients] for line in self.lines]
        return np.array(rows, np.float64).reshape(len(self.lines), len(self.clients))

    @cached_property
    def returns(self) -> np.ndarray:
        """[R, K]: mean return of the training episodes; the latest known one if no episode finished in a round."""
        return fill_forward(self.client_series(TRAINING_RETURN))

    @cached_property
    def before(self) -> np.ndarray:
        """[K]: mean return of the first policies, deterministic actions."""
        return self._result("return_before")

    @cached_property
    def after(self) -> np.ndarray:
        """[K]: mean return of the last policies, deterministic actions."""
        return self._result("return")

    @cached_property
    def trains(self) -> np.ndarray:
        """[K] bool: whether each client takes part in training."""
        return np.array([settings.trains for settings in self.scenario.clients for _ in settings.names], bool)

    @cached_property
    def adapts(self) -> np.ndarray:
        """[K] bool: the clients whose adaptation counts: those that take no part in training, or all if all do."""
        return np.ones_like(self.trains) if self.trains.all() else ~self.trains

    @cached_property
    def adapted_first(self) -> np.ndarray:
        """[K, U + 1]: mean returns of the first policies after so many local updates, from 0; U is `evaluate.adapt`."""
        return self._curves("adapted_first")

    @cached_property
    def adapted_last(self) -> np.ndarray:
        """[K, U + 1]: the same of the last policies, or without results of the latest that were adapted."""
        if self.results is not None:
            return self._curves("adapted_last")
        updates = range(self.scenario.evaluate.adapt + 1)
        series = [fill_forward(self.client_series(f"{ADAPTATION}{number}")) for number in updates]
        return np.stack([each[-1] if len(each) else np.full(len(self.clients), np.nan) for each in series], axis=1)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The shared blocks that the server stepped, in order."""
        keys = dict.fromkeys(key for line in self.lines for key in line if key.startswith("alpha/"))
        return tuple(key.removeprefix("alpha/") for key in keys)

    @cached_property
    def block_of_group(self) -> Mapping[str, str]:
        """[G]: the block of every parameter group of the shared blocks.

        A folder without `shared.json` gives the groups that its lines name, each as its own block.
        """
        if not self.federated:
            return {}
        names = read_shared_names(self.folder)
        if names is not None:
            return names.block_of_group
        departed = [group for line in self.lines for client in line["clients"].values() for group in _groups(client)]
        return {group: group for group in dict.fromkeys([*self.blocks, *departed])}

    @cached_property
    def departed(self) -> np.ndarray:
        """[R, K, G] bool: the groups that each client has left; as in the round before if the line lacks the client."""
        return self._departed(self.clients, "clients")

    @cached_property
    def sites(self) -> Mapping[str, tuple[str, ...]]:
        """[I]: the clients of every site; empty where the server merges all clients."""
        return clients_of_sites(self.scenario)

    @cached_property
    def site_departed(self) -> np.ndarray:
        """[R, I, G] bool: the groups that each site has left."""
        return self._departed(tuple(self.sites), SITES)

    @cached_property
    def site_personal(self) -> Mapping[str, tuple[str, ...]]:
        """The parameter groups that each site has left in the last round that is recorded."""
        last = self.lines[-1].get(SITES, {}) if self.lines else {}
        return {name: tuple(_groups(last.get(name, {}))) for name in self.sites}

    @cached_property
    def site_departures(self) -> Mapping[str, Mapping[str, Departure]]:
        """For each site, when and why it left the groups that it does not share at the end."""
        departures: dict[str, dict[str, Departure]] = {name: {} for name in self.sites}
        for line in self.lines:
            for name, site in line.get(SITES, {}).items():
                if name in departures:
                    note_departures(departures[name], line["round"], site.get(LEFT, {}), site.get(RETURNED, ()))
        return departures

    def _departed(self, names: Sequence[str], key: str) -> np.ndarray:
        """Read the groups that clients or sites have left from a part of the lines, [R, len(names), G] bool."""
        columns = {group: column for column, group in enumerate(self.block_of_group)}
        departed = np.zeros((len(self.lines), len(names), len(columns)), bool)
        for row, line in enumerate(self.lines):
            if row:
                departed[row] = departed[row - 1]
            for k, name in enumerate(names):
                if name in line.get(key, {}):
                    departed[row, k] = False
                    departed[row, k, [columns[group] for group in _groups(line[key][name])]] = True
        return departed

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """The blocks in which the rule `persistence` has compared clients, from input to output."""
        keys = dict.fromkeys(key for line in self.lines for key in line if key.startswith("rho/"))
        blocks = {key.removeprefix("rho/") for key in keys}
        order = [block for block in dict.fromkeys(self.block_of_group.values()) if block in blocks]
        return (*order, *sorted(blocks - set(order)))

    @cached_property
    def moves(self) -> tuple[GroupMove, ...]:
        """The departures of the rule `persistence` and the returns from them, in the order of the rounds."""
        columns = {name: column for column, name in enumerate(self.clients)}
        return tuple(
            GroupMove(line["round"], columns[name], group, kind == LEFT, _number(evidence))
            for line in self.lines
            for name, client in line["clients"].items()
            if name in columns
            for kind in (RETURNED, LEFT)
            for group, evidence in client.get(kind, {}).items()
        )

    @cached_property
    def departures(self) -> Mapping[str, Mapping[str, Departure]]:
        """For each client, when and why it left the groups that it does not share at the end."""
        departures: dict[str, dict[str, Departure]] = {name: {} for name in self.clients}
        for move in self.moves:
            left, returned = ({move.group: move.evidence}, ()) if move.left else ({}, (move.group,))
            note_departures(departures[self.clients[move.client]], move.round, left, returned)
        return departures

    @cached_property
    def clusters(self) -> np.ndarray:
        """[R, K, B]: each client's cluster in every block of `clustered`; NaN for a client outside the merge."""
        series = [self.client_series(f"cluster/{block}") for block in self.clustered]
        shape = (len(self.lines), len(self.clients), 0)
        return np.stack(series, axis=2) if series else np.zeros(shape)

    @cached_property
    def clustered(self) -> tuple[str, ...]:
        """[B]: the blocks that are merged within clusters of clients."""
        keys = dict.fromkeys(key for line in self.lines for key in line if key.startswith("clusters/"))
        return tuple(key.removeprefix("clusters/") for key in keys)

    @cached_property
    def personal(self) -> Mapping[str, tuple[str, ...]]:
        """The parameter groups that each client has left at the end."""
        if self.results is not None:
            results = self.results["clients"]
            return {name: tuple(_groups(results.get(name, {}))) for name in self.clients}
        groups = np.array(tuple(self.block_of_group), object)
        last = self.departed[-1] if self.lines else np.zeros((len(self.clients), len(groups)), bool)
        return {name: tuple(groups[row]) for name, row in zip(self.clients, last, strict=True)}

    @cached_property
    def trained(self) -> np.ndarray:
        """[R, K] bool: the clients whose training is recorded."""
        trained: np.ndarray = np.isfinite(self.client_series(TRAINING_EPISODES))
        return trained

    @cached_property
    def failed(self) -> np.ndarray:
        """[R, K] bool: the clients that gave no valid answer to an instruction, to train or to do something else."""
        failed = np.zeros((len(self.lines), len(self.clients)), bool)
        rows = {round: row for row, round in enumerate(self.rounds.tolist())}
        columns = {name: column for column, name in enumerate(self.clients)}
        for name, missed in self.missing.items():
            for miss in missed:
                if miss.round in rows and name in columns:
                    failed[rows[miss.round], columns[name]] = True
        return failed

    @cached_property
    def missing(self) -> Mapping[str, tuple[MissedRound, ...]]:
        """The rounds in which clients gave no valid answer, for the clients that have such rounds."""
        if self.results is not None:
            failures: Mapping[str, Any] = self.results.get("missing", {})
            return {name: tuple(MissedRound(*each) for each in failures[name]) for name in failures if failures[name]}
        missing: dict[str, tuple[MissedRound, ...]] = {}
        for line in self.lines:
            for name, client in line["clients"].items():
                if "failure" in client:
                    missing[name] = (*missing.get(name, ()), MissedRound(line["round"], client["failure"], ""))
        return missing

    @cached_property
    def equal(self) -> Mapping[str, Sequence[int]]:
        """The rounds in which clients could learn nothing, for the clients that have such rounds."""
        rows = self.client_series(EQUAL_GROUPS) >= 1
        rounds = {name: self.rounds[rows[:, k]].tolist() for k, name in enumerate(self.clients)}
        return {name: numbers for name, numbers in rounds.items() if numbers}

    def _curves(self, key: str) -> np.ndarray:
        """Read the returns of every client's adaptation from the results, [K, U + 1].

        They are unknown if they are of another number of updates: `evaluate.adapt` may change when a run is continued.
        """
        updates = self.scenario.evaluate.adapt
        clients: Mapping[str, Any] = {} if self.results is None else self.results["clients"]
        unknown = [np.nan] * (updates + 1)
        rows = [list(clients.get(name, {}).get(key, ())) for name in self.clients]
        return np.array([row if len(row) == updates + 1 else unknown for row in rows], np.float64)

    def _result(self, key: str) -> np.ndarray:
        """Read a number of every client from the results, [K]."""
        clients: Mapping[str, Any] = {} if self.results is None else self.results["clients"]
        return np.array([_number(clients.get(name, {}).get(key)) for name in self.clients], np.float64)


def read_history(folder: str | Path) -> History:
    """Read a run's folder; ValueError if it holds no run, or is damaged."""
    folder = Path(folder)
    scenario = read_scenario(folder)
    refuse_all_links(folder)
    lines = _read_lines(folder / ROUNDS)
    return History(folder, scenario, lines, read_results(folder))


def fill_forward(values: np.ndarray) -> np.ndarray:
    """Replace NaN in [R, ...] with the last known value before it."""
    rows = np.where(np.isfinite(values), np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1)), -1)
    latest = np.maximum.accumulate(rows, axis=0)
    filled: np.ndarray = np.where(latest < 0, np.nan, np.take_along_axis(values, np.maximum(latest, 0), axis=0))
    return filled


def _read_lines(path: Path) -> list[Mapping[str, Any]]:
    """Read all complete lines; the last one may be cut off if the machine stopped."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            lines.append(_check_line(parse_json(line), lines[-1]["round"] if lines else 0))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is no line of a run: {error}; remove the line") from None
    return lines


def _check_line(line: Any, before: int) -> Mapping[str, Any]:
    """Check a line of `rounds.jsonl` that follows the round `before`; ValueError if it is none."""
    if not isinstance(line, dict) or not isinstance(line.get("clients"), dict):
        raise ValueError("it names no clients")
    if type(line.get("round")) is not int or line["round"] <= before:
        raise ValueError(f"round = {line.get('round')!r} comes after {before}")
    clients = line["clients"].items()
    for name, metrics in (("", line), *clients):
        if not isinstance(metrics, dict):
            raise ValueError(f"client {name} has no metrics")
        for key, value in metrics.items():
            if key in TEXTS:
                if not (key == "clients" and not name) and not _is_text(key, value):
                    raise ValueError(f"{f'{name}: ' if name else ''}{key} = {shorten(repr(value))} has another form")
            elif value is not None and not isinstance(value, int | float):
                raise ValueError(f"{f'{name}: ' if name else ''}{key} = {shorten(repr(value))} is no number")
    return line


def _is_text(key: str, value: Any) -> bool:
    """Return whether the value of one of the keys in `TEXTS` has the form that it has in a line."""
    if key in ("notes", "personal_groups"):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if key == "failure":
        return isinstance(value, str)
    if key == SITES:
        parts = value.values() if isinstance(value, dict) else [None]
        return all(isinstance(part, dict) and all(_is_text(*item) for item in part.items()) for part in parts)
    return isinstance(value, dict) and all(
        number is None or isinstance(number, int | float) for number in value.values()
    )


def _groups(client: Mapping[str, Any]) -> Sequence[str]:
    """Read the parameter groups that a client has left from its part of a line or of the results."""
    groups: Sequence[str] = client.get("personal_groups", ())
    return groups


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
