"""Run folders with numbers that a test chooses, written by the recorder itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_fed.aggregation.proximity import AcceptedBlock, AcceptedStep
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.policy.shared_names import SharedNames
from grpo_fed.runs.metrics import COST_MULTIPLIER, PENALTY_NORM, PENALTY_ZEROS, TRAINING_COST, TRAINING_RETURN
from grpo_fed.runs.recorder import Recorder
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord
from grpo_fed.scenario.scenario import Scenario

BLOCKS = ("torso.0", "torso.1", "actor")
"""The shared blocks of every sample run."""


def sample_scenario(
    clients: Sequence[tuple[str, int, str]] = (("cart", 3, "CartPole-v1"),), more: str = ""
) -> Scenario:
    """Make a scenario named `made`.

    clients: name, count and environment of each entry. more: lines of TOML for the top of the file.
    """
    tables = [f'[[clients]]\nname = "{name}"\ncount = {count}\nenv = "{env}"\n' for name, count, env in clients]
    return Scenario.loads(f'name = "made"\n{more}\n{"".join(tables)}')


@dataclass(frozen=True)
class SampleRun:
    """The numbers of a run; functions take the round and the client's index."""

    returns: Callable[[int, int], float | None] = lambda round_, client: 10.0 * round_ + client
    """Mean training return."""
    departed: Callable[[int, int], tuple[str, ...]] = lambda round_, client: ()
    """Groups that the client has departed from."""
    clusters: Callable[[int, int], dict[str, int]] = lambda round_, client: {}
    """Block to the client's cluster."""
    rho: Callable[[int, int], dict[str, float]] = lambda round_, client: {}
    """Block to the client's rho."""
    left: Callable[[int, int], dict[str, float]] = lambda round_, client: {}
    """Groups that the client leaves in the round, with their rho."""
    returned: Callable[[int, int], dict[str, float]] = lambda round_, client: {}
    """Groups that the client returns to in the round, with the gain."""
    failure: Callable[[int, int], Failure | None] = lambda round_, client: None
    kl: Callable[[int], float] = lambda round_: 0.01
    """KL of each block's step in a round; that of all together is twice as high."""
    zeros: Callable[[int, int], float] | None = None
    """Share of groups at zero under a penalty, which leaves half of it as the norm of each block; None without one."""
    cost: Callable[[int, int], float] | None = None
    """Mean cost of the training episodes; None without a limit."""
    budget: float = 0.02
    alpha: float = 0.5
    federated: bool = True
    finished: bool = True
    """Whether there are results."""
    rounds: int | None = None
    """How many rounds were trained; by default all."""
    scores: Callable[[int], float] = lambda client: 100.0 + client
    """Final return of each client."""


def write_run(folder: Path, scenario: Scenario, run: SampleRun = SampleRun()) -> Path:
    """Write the folder of a run."""
    recorder = Recorder(scenario, folder, "cpu", scenario.method if run.federated else "local")
    recorder.open(lambda record: None, _shared_names(scenario) if run.federated else None)
    names = [(settings.name, name) for settings in scenario.clients for name in settings.names]
    last = run.rounds or scenario.rounds
    first = [ClientRecord(name, task, score=1.0) for task, name in names]
    recorder.round_finished(RoundRecord(0, scenario.rounds, 0.0, 0, first), None)
    for round_ in range(1, last + 1):
        clients = []
        for k, (task, name) in enumerate(names):
            score = run.scores(k) if round_ == scenario.rounds else None
            failure, value = run.failure(round_, k), run.returns(round_, k)
            sharing: dict[str, Any] = {"departed": run.departed(round_, k), "clusters": run.clusters(round_, k)}
            sharing |= {"rho": run.rho(round_, k), "left": run.left(round_, k), "returned": run.returned(round_, k)}
            if failure is not None:
                clients.append(ClientRecord(name, task, score=score, **sharing, failure=failure))
                recorder.client_failed(round_, name, failure)
            elif run.federated or value is not None:
                metrics = {} if value is None else {TRAINING_RETURN: value}
                if run.zeros is not None:
                    share = run.zeros(round_, k)
                    metrics |= {PENALTY_ZEROS: share, **{f"{PENALTY_NORM}{block}": share / 2 for block in BLOCKS}}
                if run.cost is not None:
                    metrics |= {TRAINING_COST: run.cost(round_, k), COST_MULTIPLIER: run.cost(round_, k) / 10}
                clients.append(ClientRecord(name, task, 100, 4, metrics, score, **sharing))
        server = _server_record(run, round_, len(names)) if run.federated else None
        if server is not None and any(client.rho for client in clients):
            server = replace(server, rho_limit=0.5)
        record = RoundRecord(round_, scenario.rounds, 2.0, 100 * round_ * len(names), clients, server)
        recorder.round_finished(record, None)
    if run.finished:
        departed = {name: run.departed(last, k) for k, (_, name) in enumerate(names)}
        clusters = {name: run.clusters(last, k) for k, (_, name) in enumerate(names)}
        recorder.finish(departed=departed, clusters=clusters)
    return folder


def _shared_names(scenario: Scenario) -> SharedNames:
    """The names of a scenario's shared blocks; those of every sample run if its clients cannot share them."""
    try:
        return resolve_shared_blocks(scenario).names
    except ValueError:
        return SharedNames(BLOCKS, {block: block for block in BLOCKS})


def _server_record(run: SampleRun, round_: int, clients: int) -> ServerRecord:
    """Make the record of a server to which each client sends 1 kB and which answers with 2 kB."""
    kl = run.kl(round_)
    blocks = tuple(AcceptedBlock(block, 4 * kl, run.budget, run.alpha, kl) for block in BLOCKS)
    step = AcceptedStep(blocks, 8 * kl, 0.05, 2 * kl)
    return ServerRecord(step, {}, 1000 * clients, 2000 * clients, 3000 * clients * round_)
