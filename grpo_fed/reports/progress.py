"""The progress of a run as records, and a round as a line of text; displays.py shows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grpo_fed.reports.formatting import (
    format_count,
    format_duration,
    format_names,
    format_return,
    format_small,
    is_finite,
)
from grpo_fed.reports.score_text import mixed_round_parts
from grpo_fed.reports.tables import ClientProgress, TrainingColumn, training_columns
from grpo_fed.runs.equal_groups import equal_groups_note
from grpo_fed.runs.metrics import EQUAL_GROUPS
from grpo_fed.runs.records import MB, RoundRecord, ServerRecord, SiteRecord
from grpo_fed.scenario.scenario import Scenario

MAX_FAILURES = 5
"""How many clients without an answer a line names."""
RECENT_ROUNDS = 10
"""Rounds whose mean duration predicts the time that is left."""


@dataclass(frozen=True)
class RunHeader:
    """What is known of a run before its first round."""

    scenario: Scenario
    device: str
    out: Path
    """The run's folder."""
    method: str = ""
    """The federation's method; empty without a federation."""
    tracked: str = ""
    """Where MLflow shows the run, an address or a command; empty if the run is not tracked."""

    @property
    def facts(self) -> str:
        """Clients, rounds, method, preset, device and seed in one line."""
        scenario = self.scenario
        clients = format_count(sum(entry.count for entry in scenario.clients), "client")
        rounds = f"{format_count(scenario.rounds, 'round')} of {scenario.steps:,} {scenario.unit}"
        method = f"{self.method}, " if self.method else ""
        return f"{clients}, {rounds}, {method}{scenario.objective.preset}, {self.device}, seed {scenario.seed}"

    @property
    def places(self) -> list[str]:
        """The run's folder, and where MLflow shows the run, a line each."""
        return [f"{self.out}/", *([f"MLflow: {self.tracked}"] if self.tracked else [])]


@dataclass
class RunProgress:
    """How far a run has come, added up round by round."""

    clients: dict[str, ClientProgress] = field(default_factory=dict)
    round: int = 0
    """The latest round; 0 is the evaluation before the first."""
    rounds: int = 0
    """How many rounds the run will have."""
    seconds: float = 0.0
    """Duration of training and of the server's step in the latest round."""
    speed: float = 0.0
    """Steps per second of all clients together, in the latest round."""
    unit: str = "steps"
    """What a step is, `Scenario.unit`."""
    note: str = ""
    """About clients that could learn nothing in the latest round; empty if there are none."""
    is_new_note: bool = False
    """Whether the note differs from that of the round before."""
    end_times: list[float] = field(default_factory=list)
    """When each round ended, on the monotonic clock."""
    server: str = ""
    """What the server did in the latest round, in words; empty without a federation."""

    def add(self, record: RoundRecord) -> None:
        """Take in one more round."""
        self.round, self.rounds, self.seconds = record.round, record.rounds, record.seconds
        self.end_times.append(time.monotonic())
        note = equal_groups_note(record.equal)
        self.note, self.is_new_note = note, note not in ("", self.note)
        if record.round == 0:
            self.clients = {client.client: ClientProgress(client.score) for client in record.clients}
        for client in record.clients if record.round else ():
            progress = self.clients.setdefault(client.client, ClientProgress())
            if client.mean is not None:
                progress.returns.append(client.mean)
            progress.failure = "" if client.failure is None else client.failure.kind
            if record.server is not None:
                progress.departed, progress.clusters = client.departed, client.clusters
            if client.steps:
                progress.kl = client.metrics.get("losses/approx_kl")
                progress.entropy = client.metrics.get("losses/entropy")
                progress.equal = client.metrics.get(EQUAL_GROUPS)
        if record.seconds:
            self.speed = record.steps / record.seconds
        if record.server is not None:
            self.server = server_line(record.server, record.sites)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last round ends, if all take as long as the recent ones; None before the first round."""
        recent = self.end_times[-RECENT_ROUNDS - 1 :]
        if len(recent) < 2:
            return None
        mean = (recent[-1] - recent[0]) / (len(recent) - 1)
        return max(0.0, recent[-1] + mean * (self.rounds - self.round) - time.monotonic())


def round_line(record: RoundRecord, progress: RunProgress) -> str:
    """Write a round in one line; `progress` has the round in it already."""
    parts = [f"round {record.round:>{len(str(record.rounds))}}/{record.rounds}"]
    parts += mixed_round_parts(record) if record.scales else _return_parts(record)
    clients = progress.clients.values()
    parts += [f"{column.name} {_mean(map(column.value, clients), column)}" for column in training_columns(clients)]
    if record.server is not None:
        parts.append(server_line(record.server, record.sites))
        failures = [f"{client.client} {client.failure.kind}" for client in record.clients if client.failure is not None]
        parts += failures[:MAX_FAILURES]
    parts += [f"{record.seconds:.2f} s", f"{progress.speed:,.0f} {progress.unit}/s"]
    if progress.seconds_left is not None and record.round < record.rounds:
        parts.append(f"{format_duration(progress.seconds_left)} left")
    return "  ".join(parts)


def _return_parts(record: RoundRecord) -> list[str]:
    """Describe the returns of a round: training, the worst client, and the evaluation if there was one."""
    means = record.returns
    parts = [f"return {format_return(float(np.mean(list(means.values()))) if means else None)}"]
    if len(means) > 1:
        worst = min(means, key=lambda name: means[name])
        parts.append(f"worst {worst} {format_return(means[worst])}")
    scores = [client.score for client in record.clients if client.trains and client.score is not None]
    return parts + ([f"evaluated {format_return(float(np.mean(scores)))}"] if scores else [])


def _mean(values: Iterable[float | None], column: TrainingColumn) -> str:
    """Write the mean of the known values."""
    known = [value for value in values if is_finite(value)]
    return column.format(float(np.mean(known)) if known else None)


def server_line(server: ServerRecord, sites: Sequence[SiteRecord] = ()) -> str:
    """Write how far the shared blocks moved, the KL with its budget, the bytes, and what sites have departed from."""
    parts = []
    if server.step is not None and server.step.blocks:
        fractions = [block.alpha for block in server.step.blocks]
        short = [f"{block.block} {block.alpha:.0%}" for block in server.step.blocks if block.alpha < 1]
        parts.append("whole step" if min(fractions) == 1 else f"step {format_names(short)}")
        if server.step.joint is not None:
            budget = f" of {server.step.joint_budget:g}" if is_finite(server.step.joint_budget) else ""
            parts.append(f"shared KL {format_small(server.step.joint)}{budget}")
    parts.append(f"{(server.bytes_up + server.bytes_down) / MB:.2f} MB")
    parts += [f"site {site.site} departed from {format_names(site.departed)}" for site in sites if site.departed]
    return "  ".join(parts)
