"""Run folders with numbers that a test knows, written by the journal itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.metrics import TRAINING_RETURN
from grpo_fed.runs.recorder import Recorder
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord
from grpo_fed.scenario.scenario import Scenario

BLOCKS = ("torso.0", "torso.1", "actor")


def scenario(clients: Sequence[tuple[str, int, str]] = (("cart", 3, "CartPole-v1"),), more: str = "") -> Scenario:
    """Of these names, counts and environments."""
    tables = [f'[[clients]]\nname = "{name}"\ncount = {count}\nenv = "{env}"\n' for name, count, env in clients]
    return Scenario.loads(f'name = "made"\n{more}\n{"".join(tables)}')


@dataclass(frozen=True)
class Made:
    """What a test says of a run; by default nothing is remarkable."""

    returns: Callable[[int, int], float | None] = lambda round_, client: 10.0 * round_ + client
    left: Callable[[int, int], tuple[str, ...]] = lambda round_, client: ()
    clusters: Callable[[int, int], dict[str, int]] = lambda round_, client: {}
    failure: Callable[[int, int], Failure | None] = lambda round_, client: None
    kl: Callable[[int], float] = lambda round_: 0.01
    budget: float = 0.02
    alpha: float = 0.5
    federated: bool = True
    finished: bool = True
    rounds: int | None = None
    """How many there were; by default all."""
    scores: Callable[[int], float] = lambda client: 100.0 + client
    """At the end."""


def write_run(folder: Path, scenario: Scenario, made: Made = Made()) -> Path:
    """A run folder."""
    recorder = Recorder(scenario, folder, "cpu", scenario.method if made.federated else "local")
    groups = resolve_shared_blocks(scenario).groups if made.federated else None
    recorder.open(lambda record: None, None if groups is None else dict(zip(groups.names, groups.blocks, strict=True)))
    names = [(settings.name, name) for settings in scenario.clients for name in settings.names]
    last = made.rounds or scenario.rounds
    first = [ClientRecord(name, task, score=1.0) for task, name in names]
    recorder.round_finished(RoundRecord(0, scenario.rounds, 0.0, 0, first), None)
    for number in range(1, last + 1):
        clients = []
        for k, (task, name) in enumerate(names):
            score = made.scores(k) if number == scenario.rounds else None
            failure, value = made.failure(number, k), made.returns(number, k)
            own: dict[str, Any] = {"departed": made.left(number, k), "clusters": made.clusters(number, k)}
            if failure is not None:
                clients.append(ClientRecord(name, task, score=score, **own, failure=failure))
                recorder.client_failed(number, name, failure)
            elif made.federated or value is not None:
                metrics = {} if value is None else {TRAINING_RETURN: value}
                clients.append(ClientRecord(name, task, 100, 4, metrics, score, **own))
        server = _server(made, number, len(names)) if made.federated else None
        note = RoundRecord(number, scenario.rounds, 2.0, 100 * number * len(names), clients, server)
        recorder.round_finished(note, None)
    if made.finished:
        personal = {name: made.left(last, k) for k, (_, name) in enumerate(names)}
        clusters = {name: made.clusters(last, k) for k, (_, name) in enumerate(names)}
        recorder.finish(departed=personal, clusters=clusters)
    return folder


def _server(made: Made, number: int, clients: int) -> ServerRecord:
    kl = made.kl(number)
    blocks = tuple(AcceptedBlock(block, 4 * kl, made.budget, made.alpha, kl) for block in BLOCKS)
    return ServerRecord(
        AcceptedStep(blocks, 8 * kl, 0.05, 2 * kl), {}, 1000 * clients, 2000 * clients, 3000 * clients * number
    )
