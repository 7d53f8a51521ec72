"""What a run's rounds come to: counted note by note, kept in checkpoints, and at the end a `Result`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from grpo_fed.federation.messages import Failure
from grpo_fed.runs.folder import ClientResult, Result, Status
from grpo_fed.runs.records import RoundNote
from grpo_fed.scenario.scenario import Scenario

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

    def add(self, note: RoundNote) -> None:
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
