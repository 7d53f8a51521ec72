"""A run as its folder tells it, under way, stopped or finished: its numbers by round and client, as arrays.

K clients in the scenario's order, R rounds, G groups of the shared blocks. What is not known is NaN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fed.policy.shared import read_task_shapes, resolve_shared_blocks, resolve_shared_blocks_from_shapes
from grpo_fed.runs.folder import ROUNDS, read_engine_state, read_scenario
from grpo_fed.runs.records import RETURN
from grpo_fed.runs.results import read_results
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import short_toml

WORDS = {"clients", "notes", "personal_groups", "failure"}
"""What a line has beside numbers."""
EVALUATED = "eval/episodic_return"
"""The key of a client's return with deterministic actions."""


@dataclass(frozen=True)
class MissedRound:
    """A client without an answer."""

    round: int
    kind: str
    """As `messages.Failure` has it."""
    reason: str
    """In words; empty where the run did not get to say."""


@dataclass(frozen=True, eq=False)
class History:
    """All that a run folder tells."""

    folder: Path
    scenario: Scenario
    lines: Sequence[Mapping[str, Any]]
    """[R]: those of `rounds.jsonl`."""
    results: Mapping[str, Any] | None
    """`results.json`; None while there is none."""

    @property
    def status(self) -> str:
        """As the results have it, or `unfinished`."""
        return "unfinished" if self.results is None else str(self.results["status"])

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """[K]."""
        return tuple(name for settings in self.scenario.clients for name in settings.names)

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """[K]: the name of the scenario's entry that each client is of."""
        return tuple(settings.name for settings in self.scenario.clients for _ in settings.names)

    @cached_property
    def envs(self) -> tuple[str, ...]:
        """[K]."""
        return tuple(settings.env for settings in self.scenario.clients for _ in settings.names)

    @cached_property
    def rounds(self) -> np.ndarray:
        """[R] int64: their numbers."""
        return np.array([line["round"] for line in self.lines], np.int64)

    @cached_property
    def federated(self) -> bool:
        """Whether there was a server."""
        return any("fed/clients_ok" in line for line in self.lines)

    def server_series(self, key: str) -> np.ndarray:
        """[R]: a number of the whole."""
        return np.array([_number(line.get(key)) for line in self.lines], np.float64)

    def client_series(self, key: str) -> np.ndarray:
        """[R, K]: a number of every client."""
        rows = [[_number(line["clients"].get(name, {}).get(key)) for name in self.clients] for line in self.lines]
        return np.array(rows, np.float64).reshape(len(self.lines), len(self.clients))

    @cached_property
    def returns(self) -> np.ndarray:
        """[R, K]: of the training episodes; a client that finished none in a round still has its last one."""
        return fill_forward(self.client_series(RETURN))

    @cached_property
    def before(self) -> np.ndarray:
        """[K]: of the first policies, deterministic actions."""
        return self._result("return_before")

    @cached_property
    def after(self) -> np.ndarray:
        """[K]: of the last policies, deterministic actions."""
        return self._result("return")

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The shared blocks that the server spoke of, in order."""
        keys = dict.fromkeys(key for line in self.lines for key in line if key.startswith("alpha/"))
        return tuple(key.removeprefix("alpha/") for key in keys)

    @cached_property
    def block_of_group(self) -> Mapping[str, str]:
        """[G]: every group of the shared blocks, and the block that it lies in.

        Where the tasks cannot be made here, those that the run spoke of, each under its own name.
        """
        if not self.federated:
            return {}
        forms = read_task_shapes(read_engine_state(self.folder))
        try:
            groups = (
                resolve_shared_blocks_from_shapes(self.scenario, forms)
                if forms
                else resolve_shared_blocks(self.scenario)
            ).groups
        except ValueError:  # a library that a task needs is not here
            left = [group for line in self.lines for one in line["clients"].values() for group in _groups(one)]
            return {group: group for group in dict.fromkeys([*self.blocks, *left])}
        return dict(zip(groups.names, groups.blocks, strict=True))

    @cached_property
    def departed(self) -> np.ndarray:
        """[R, K, G] bool: who has left which group; in a round without word of a client, as before."""
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
        """[R, K, B]: the cluster of each client in every block of `clustered`; NaN for who was not in the merge."""
        found = [self.client_series(f"cluster/{block}") for block in self.clustered]
        shape = (len(self.lines), len(self.clients), 0)
        return np.stack(found, axis=2) if found else np.zeros(shape)

    @cached_property
    def clustered(self) -> tuple[str, ...]:
        """[B]: the blocks that are merged by clusters of clients."""
        keys = dict.fromkeys(key for line in self.lines for key in line if key.startswith("clusters/"))
        return tuple(key.removeprefix("clusters/") for key in keys)

    @cached_property
    def personal(self) -> Mapping[str, tuple[str, ...]]:
        """By client, the groups that it has left at the end."""
        if self.results is not None:
            found = self.results["clients"]
            return {name: tuple(_groups(found.get(name, {}))) for name in self.clients}
        groups = np.array(tuple(self.block_of_group), object)
        last = self.departed[-1] if self.lines else np.zeros((len(self.clients), len(groups)), bool)
        return {name: tuple(groups[row]) for name, row in zip(self.clients, last, strict=True)}

    @cached_property
    def trained(self) -> np.ndarray:
        """[R, K] bool: whose training there is word of."""
        known: np.ndarray = np.isfinite(self.client_series("charts/episodes"))
        return known

    @cached_property
    def failed(self) -> np.ndarray:
        """[R, K] bool: who was asked and had no answer, to training or to what came after it."""
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
        """By client, when it had no answer; who always had one is not there."""
        if self.results is not None:
            told: Mapping[str, Any] = self.results.get("missing", {})
            return {name: tuple(MissedRound(*one) for one in every) for name, every in told.items() if every}
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
    """Of a run folder; ValueError if it is none, or damaged."""
    folder = Path(folder)
    scenario = read_scenario(folder)
    lines = _lines(folder / ROUNDS)
    return History(folder, scenario, lines, read_results(folder))


def fill_forward(values: np.ndarray) -> np.ndarray:
    """[R, ...] with what was known last in the place of NaN."""
    known = np.where(np.isfinite(values), np.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1)), -1)
    latest = np.maximum.accumulate(known, axis=0)
    found: np.ndarray = np.where(latest < 0, np.nan, np.take_along_axis(values, np.maximum(latest, 0), axis=0))
    return found


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """Every round that is there as a whole: a machine that stops may cut the last line."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            found.append(_line(json.loads(line), found[-1]["round"] if found else 0))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is no line of a run: {error}; remove it") from None
    return found


def _line(line: Any, before: int) -> Mapping[str, Any]:
    """A line of `rounds.jsonl`, after that of another round; ValueError if it is none."""
    if not isinstance(line, dict) or not isinstance(line.get("clients"), dict):
        raise ValueError("it names no clients")
    if not isinstance(line.get("round"), int) or line["round"] <= before:
        raise ValueError(f"round = {line.get('round')!r} comes after {before}")
    clients = line["clients"].items()
    for name, own in (("", line), *clients):
        if not isinstance(own, dict):
            raise ValueError(f"client {name} has no metrics")
        for key, value in own.items():
            if key not in WORDS and value is not None and not isinstance(value, int | float):
                raise ValueError(f"{f'{name}: ' if name else ''}{key} = {short_toml(value)} is no number")
    return line


def _groups(client: Mapping[str, Any]) -> Sequence[str]:
    """That a client has left; nothing is said where it left none."""
    left: Sequence[str] = client.get("personal_groups", ())
    return left


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
