"""A run as arrays by round and client, read from its folder, whether it is under way, stopped or finished.

K clients in the scenario's order, R rounds, G parameter groups of the shared blocks. Unknown numbers are NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fed.runs.folder import ROUNDS, read_block_of_group, read_scenario
from grpo_fed.runs.metrics import CLIENTS_OK, TEXTS, TRAINING_EPISODES, TRAINING_RETURN
from grpo_fed.runs.results import read_results
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import short_toml


@dataclass(frozen=True)
class MissedRound:
    """A round in which a client gave no valid answer."""

    round: int
    kind: str
    """The kind of `records.Failure`."""
    reason: str
    """The reason in words; empty if the run has not finished."""


@dataclass(frozen=True, eq=False)
class History:
    """What a run's folder says."""

    folder: Path
    scenario: Scenario
    lines: Sequence[Mapping[str, Any]]
    """[R]: the lines of `rounds.jsonl`."""
    results: Mapping[str, Any] | None
    """`results.json`; None if there is none yet."""

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
        return tuple(settings.env for settings in self.scenario.clients for _ in settings.names)

    @cached_property
    def rounds(self) -> np.ndarray:
        """[R] int64: the rounds' numbers."""
        return np.array([line["round"] for line in self.lines], np.int64)

    @cached_property
    def federated(self) -> bool:
        """Whether the clients learned in a federation."""
        return any(CLIENTS_OK in line for line in self.lines)

    def server_series(self, key: str) -> np.ndarray:
        """[R]: a metric of the whole federation."""
        return np.array([_number(line.get(key)) for line in self.lines], np.float64)

    def client_series(self, key: str) -> np.ndarray:
        """[R, K]: a metric of every client."""
        rows = [[_number(line["clients"].get(name, {}).get(key)) for name in self.clients] for line in self.lines]
        return np.array(rows, np.float64).reshape(len(self.lines), len(self.clients))

    @cached_property
    def returns(self) -> np.ndarray:
        """[R, K]: mean return of the training episodes; in a round without a finished episode the last known one."""
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
        blocks = read_block_of_group(self.folder)
        if blocks is not None:
            return blocks
        departed = [group for line in self.lines for client in line["clients"].values() for group in _groups(client)]
        return {group: group for group in dict.fromkeys([*self.blocks, *departed])}

    @cached_property
    def departed(self) -> np.ndarray:
        """[R, K, G] bool: the groups that each client has left; as in the round before if the line lacks the client."""
        place = {group: number for number, group in enumerate(self.block_of_group)}
        left = np.zeros((len(self.lines), len(self.clients), len(place)), bool)
        for number, line in enumerate(self.lines):
            if number:
                left[number] = left[number - 1]
            for k, name in enumerate(self.clients):
                if name in line["clients"]:
                    left[number, k] = False
                    left[number, k, [place[group] for group in _groups(line["clients"][name])]] = True
        return left

    @cached_property
    def clusters(self) -> np.ndarray:
        """[R, K, B]: each client's cluster in every block of `clustered`; NaN for a client that was not in the merge."""
        found = [self.client_series(f"cluster/{block}") for block in self.clustered]
        shape = (len(self.lines), len(self.clients), 0)
        return np.stack(found, axis=2) if found else np.zeros(shape)

    @cached_property
    def clustered(self) -> tuple[str, ...]:
        """[B]: the blocks that are merged within clusters of clients."""
        keys = dict.fromkeys(key for line in self.lines for key in line if key.startswith("clusters/"))
        return tuple(key.removeprefix("clusters/") for key in keys)

    @cached_property
    def personal(self) -> Mapping[str, tuple[str, ...]]:
        """The parameter groups that each client has left at the end."""
        if self.results is not None:
            found = self.results["clients"]
            return {name: tuple(_groups(found.get(name, {}))) for name in self.clients}
        groups = np.array(tuple(self.block_of_group), object)
        last = self.departed[-1] if self.lines else np.zeros((len(self.clients), len(groups)), bool)
        return {name: tuple(groups[row]) for name, row in zip(self.clients, last, strict=True)}

    @cached_property
    def trained(self) -> np.ndarray:
        """[R, K] bool: the clients whose training is recorded."""
        known: np.ndarray = np.isfinite(self.client_series(TRAINING_EPISODES))
        return known

    @cached_property
    def failed(self) -> np.ndarray:
        """[R, K] bool: the clients that were asked and gave no valid answer, to training or to what came after it."""
        failed = np.zeros((len(self.lines), len(self.clients)), bool)
        row = {number: place for place, number in enumerate(self.rounds.tolist())}
        column = {name: place for place, name in enumerate(self.clients)}
        for name, misses in self.missing.items():
            for miss in misses:
                if miss.round in row and name in column:
                    failed[row[miss.round], column[name]] = True
        return failed

    @cached_property
    def missing(self) -> Mapping[str, tuple[MissedRound, ...]]:
        """The rounds in which clients gave no valid answer, for the clients that have such rounds."""
        if self.results is not None:
            missing: Mapping[str, Any] = self.results.get("missing", {})
            return {
                name: tuple(MissedRound(*failure) for failure in failures)
                for name, failures in missing.items()
                if failures
            }
        found: dict[str, tuple[MissedRound, ...]] = {}
        for line in self.lines:
            for name, one in line["clients"].items():
                if "failure" in one:
                    found[name] = (*found.get(name, ()), MissedRound(line["round"], one["failure"], ""))
        return found

    def _result(self, key: str) -> np.ndarray:
        clients: Mapping[str, Any] = {} if self.results is None else self.results["clients"]
        return np.array([_number(clients.get(name, {}).get(key)) for name in self.clients], np.float64)


def read_history(folder: str | Path) -> History:
    """Read a run's folder; ValueError if it holds no run, or is damaged."""
    folder = Path(folder)
    scenario = read_scenario(folder)
    lines = _lines(folder / ROUNDS)
    return History(folder, scenario, lines, read_results(folder))


def fill_forward(values: np.ndarray) -> np.ndarray:
    """Replace NaN in [R, ...] with the last known value before it."""
    known = np.where(np.isfinite(values), np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1)), -1)
    latest = np.maximum.accumulate(known, axis=0)
    found: np.ndarray = np.where(latest < 0, np.nan, np.take_along_axis(values, np.maximum(latest, 0), axis=0))
    return found


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """Read every complete line: a machine that stops may cut the last one."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            found.append(_line(json.loads(line), found[-1]["round"] if found else 0))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is no line of a run: {error}; remove the line") from None
    return found


def _line(line: Any, before: int) -> Mapping[str, Any]:
    """Check a line of `rounds.jsonl` that follows the round `before`; ValueError if it is none."""
    if not isinstance(line, dict) or not isinstance(line.get("clients"), dict):
        raise ValueError("it names no clients")
    if not isinstance(line.get("round"), int) or line["round"] <= before:
        raise ValueError(f"round = {line.get('round')!r} comes after {before}")
    clients = line["clients"].items()
    for name, own in (("", line), *clients):
        if not isinstance(own, dict):
            raise ValueError(f"client {name} has no metrics")
        for key, value in own.items():
            if key not in TEXTS and value is not None and not isinstance(value, int | float):
                raise ValueError(f"{f'{name}: ' if name else ''}{key} = {short_toml(value)} is no number")
    return line


def _groups(client: Mapping[str, Any]) -> Sequence[str]:
    """The parameter groups that a client's line says it has left."""
    left: Sequence[str] = client.get("personal_groups", ())
    return left


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
