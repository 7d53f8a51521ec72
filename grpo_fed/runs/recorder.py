"""Writes a run's folder while the run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from grpo_fed.runs import checkpoint
from grpo_fed.runs.files import append_line, write_atomic
from grpo_fed.runs.folder import FAILURE, POLICIES, ROUNDS, SCENARIO, check_usable
from grpo_fed.runs.records import Failure, RoundRecord, record_to_line
from grpo_fed.runs.results import RESULTS, ClientResult, Result, Status
from grpo_fed.scenario.scenario import Scenario

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
            check_usable(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for old in [folder / RESULTS, folder / FAILURE, *(folder / POLICIES).glob("*.safetensors")]:
                old.unlink(missing_ok=True)
            checkpoint.remove(folder)
            write_atomic(folder / ROUNDS, "")
            write_atomic(folder / SCENARIO, scenario.dumps())
        return cls(folder)

    @classmethod
    def reopen(cls, folder: Path | None, rounds: int) -> Journal:
        """Go on after so many rounds; lines of later ones, which are trained again, go."""
        if folder is not None:
            (folder / RESULTS).unlink(missing_ok=True)
            (folder / FAILURE).unlink(missing_ok=True)
            lines = (folder / ROUNDS).read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomic(folder / ROUNDS, "".join(lines[:rounds]))
        return cls(folder)

    def write(self, note: RoundRecord) -> None:
        """A line for a round that trained, on the disk before the round's checkpoint is."""
        if self.folder is not None and note.round > 0:
            append_line(self.folder / ROUNDS, json.dumps(record_to_line(note), allow_nan=False), durable=True)

    def close(self, result: Result) -> None:
        """The results, last of all, so that who finds these finds all."""
        if self.folder is not None:
            document = json.dumps(result.document(), indent=2, allow_nan=False)
            write_atomic(self.folder / RESULTS, document + "\n")


def status_of(error: BaseException | None) -> Status:
    """How a run ended that this stopped."""
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


KEPT = ("rounds", "episodes", "steps", "best", "first", "last", "missing", "up", "down")
"""What a checkpoint has of them."""


@final
class Totals:
    """From a run's first round to where it is."""

    def __init__(self, scenario: Scenario, device: str) -> None:
        self.scenario = scenario
        self.device = device
        self.envs = {name: settings.env for settings in scenario.clients for name in settings.names}
        """By client, in the scenario's order."""
        self.began = time.perf_counter()
        self.rounds = 0
        self.episodes = dict.fromkeys(self.envs, 0)
        self.steps = dict.fromkeys(self.envs, 0)
        self.best: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        """When they played after the latest round."""
        self.sampled: dict[str, float] = {}
        self.missing: dict[str, list[tuple[int, str, str]]] = {}
        self.up = 0
        """Bytes."""
        self.down = 0

    @property
    def env_steps(self) -> int:
        """Of all clients."""
        return sum(self.steps.values())

    def document(self) -> dict[str, Any]:
        """What `load` needs; JSON."""
        return {**{name: getattr(self, name) for name in KEPT}, "seconds": time.perf_counter() - self.began}

    def load(self, kept: Mapping[str, Any]) -> None:
        """Go on where `document` was."""
        for name in KEPT:
            setattr(self, name, kept[name])
        self.began = time.perf_counter() - kept["seconds"]

    def add(self, note: RoundRecord) -> None:
        """One more round, or with number 0 what there was before."""
        self.rounds = note.round
        self.last = note.scores
        if note.round == 0:
            self.first = self.last
        for one in note.clients:
            self.episodes[one.client] += one.episodes
            self.steps[one.client] += one.steps
            if one.mean is not None:
                self.best[one.client] = max(one.mean, self.best.get(one.client, one.mean))

    def miss(self, number: int, client: str, failure: Failure) -> None:
        """A client without an answer in a round."""
        self.missing.setdefault(client, []).append((number, failure.kind, failure.reason))

    def result(
        self,
        status: Status,
        out: Path | None,
        error: BaseException | None = None,
        method: str = "local",
        personal: Mapping[str, Sequence[str]] | None = None,
        clusters: Mapping[str, Mapping[str, int]] | None = None,
    ) -> Result:
        """The whole, with the clients in the scenario's order.

        personal: the groups that each has left. clusters: of each by block the one that it is in.
        """
        over = status == "finished" or self.rounds == self.scenario.rounds
        after = self.last if over else {}  # else they have learned since
        clients = {
            name: ClientResult(
                env=env,
                before=self.first.get(name),
                after=after.get(name),
                sampled=self.sampled.get(name),
                best=self.best.get(name),
                episodes=self.episodes[name],
                env_steps=self.steps[name],
                personal_groups=tuple((personal or {}).get(name, ())),
                clusters=dict((clusters or {}).get(name, {})),
            )
            for name, env in self.envs.items()
        }
        return Result(
            scenario=self.scenario.name,
            seed=self.scenario.seed,
            device=self.device,
            status=status,
            error=None if error is None else f"{type(error).__name__}: {error}".rstrip(": "),
            rounds=self.rounds,
            seconds=time.perf_counter() - self.began,
            env_steps=self.env_steps,
            clients=clients,
            out=out,
            method=method,
            bytes_up=self.up,
            bytes_down=self.down,
            missing=self.missing,
        )
