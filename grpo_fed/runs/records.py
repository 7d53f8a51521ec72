"""Records of what happened in a round, and the line of `rounds.jsonl` that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_fed.aggregation.proximity.records import AcceptedStep
from grpo_fed.runs.equal_groups import equal_groups_note, has_equal_groups_alone
from grpo_fed.runs.line_numbers import finite_or_none, finite_values, four_digits, mean_of_known
from grpo_fed.runs.mean_returns import mean_metrics, score_metrics
from grpo_fed.runs.metrics import (
    ADAPTATION,
    ADAPTED_RETURN,
    CLIENTS_FAILED,
    CLIENTS_OK,
    COMPARISON,
    COMPARISON_EPISODES,
    DEPARTED_GROUPS,
    ENV_STEPS,
    EVALUATION_COST,
    EVALUATION_RETURN,
    LEFT,
    MB_DOWN,
    MB_TOTAL,
    MB_UP,
    MERGE_LENGTH,
    RETURNED,
    RHO_BY_GROUP,
    RHO_LIMIT,
    ROUND_SECONDS,
    SITE,
    SITES,
    STALENESS,
    STAYED,
    STEPS_PER_SECOND,
    TRAINING_EPISODES,
    TRAINING_LENGTH,
    TRAINING_RETURN,
    VIRTUAL_SECONDS,
)
from grpo_fed.runs.privacy import PrivacyCost
from grpo_fed.runs.sharing_verdicts import note_costs
from grpo_fed.tasks.scores import ReturnScale

MB = 1e6
SITE_MEANS = (EVALUATION_RETURN, TRAINING_RETURN)
"""The metrics that a site has as the mean of its clients'."""


@dataclass(frozen=True)
class Failure:
    """Explains why a client gave no valid answer."""

    kind: str
    """`raised`, `died`, `late`, `refused` or `unreachable`."""
    reason: str
    """The reason in words, on one line."""


@dataclass(frozen=True)
class ClientRecord:
    """Records what a client did in a round."""

    client: str
    task: str
    """The name of the scenario's entry that the client belongs to."""
    steps: int = 0
    """Environment steps that it learned from; 0 if it did not train or its answer did not arrive."""
    episodes: int = 0
    """Training episodes that finished."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of its training, by the keys of `runs.metrics`."""
    score: float | None = None
    """Mean return of its evaluation episodes after the round; None if it was not evaluated."""
    kl: float | None = None
    """KL of the server's step on this client's own states; None if it did not measure it."""
    departed: tuple[str, ...] = ()
    """The shared parameter groups that it has left, in order."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """The client's cluster in every block, 0 being the one with the greatest weight; empty if the merge has none."""
    failure: Failure | None = None
    """Its first failure in this round."""
    rho: Mapping[str, float] = field(default_factory=dict)
    """With the merge rule `persistence`, each block's greatest rho; empty while the client is not compared."""
    rho_by_group: Mapping[str, float] = field(default_factory=dict)
    """With this rule, rho in each group; empty if every block is one group, or if a record would have too many."""
    left: Mapping[str, float] = field(default_factory=dict)
    """With this rule, the groups that it left in this round, with the rho that decided."""
    returned: Mapping[str, float] = field(default_factory=dict)
    """The groups that it returned to in this round, with the gain that decided."""
    stayed: Mapping[str, float] = field(default_factory=dict)
    """The groups in which it was in conflict and stays, since sharing is no worse, with the rho of the conflict."""
    comparison: Mapping[str, float] = field(default_factory=dict)
    """What it saw when it played with its own parameters and with the shared ones: the mean returns `own` and `shared`,
    the standard `error` of their difference, what the client has `learned`, and the number of `episodes`."""
    age: int | None = None
    """Merges between its beginning and the one that its answer is in; None if the server waits for all clients."""
    adapted: tuple[float, ...] = ()
    """Mean return of its evaluation episodes after each of `evaluate.adapt` local updates; empty without any."""
    trains: bool = True
    """Whether it takes part in training; otherwise it counts in no metric of the whole but those of adaptation."""
    last_kl: Mapping[str, float] = field(default_factory=dict)
    """KL of the last round's step on its own states, as `ServerRecord.last_kl`; empty if it did not measure it."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """What callbacks have logged of it, by key."""
    cost: float | None = None
    """Mean cost of its evaluation episodes after the round; None where costs have no limit."""

    @property
    def mean(self) -> float | None:
        """Mean return of its training episodes; None if none finished."""
        return self.metrics.get(TRAINING_RETURN)


@dataclass(frozen=True)
class ServerRecord:
    """Records what the server did in a round."""

    step: AcceptedStep | None
    """The step that was accepted; None in a round without a merge."""
    last_kl: Mapping[str, float]
    """KL of the last round's step as clients measured it afterwards: `joint`, and each block; empty if unknown."""
    bytes_up: int
    """Bytes that came from clients since the last round."""
    bytes_down: int
    """Bytes that went to clients since the last round."""
    bytes_total: int
    """Bytes both ways since the run began."""
    notes: tuple[str, ...] = ()
    """Messages for a person."""
    rho_limit: float | None = None
    """With the merge rule `persistence`, the rho above which a client may leave; None while there is no rho."""
    merge_length: float | None = None
    """The part of the way to the merge that a buffer's clients might move the shared blocks; None without a buffer."""
    virtual_seconds: float | None = None
    """Virtual seconds since the run began; None where clients have no paces of their own."""
    privacy: PrivacyCost | None = None
    """What was spent of the privacy budget; None without one."""


@dataclass(frozen=True)
class SiteRecord:
    """Records what a site did in a round."""

    site: str
    clients: tuple[str, ...]
    """The names of its clients."""
    step: AcceptedStep | None = None
    """The step of the site, from what its clients began with to its point; None in a round in which it merged
    nothing."""
    departed: tuple[str, ...] = ()
    """The shared parameter groups that it has left, in order."""
    rho: Mapping[str, float] = field(default_factory=dict)
    """With the merge rule `persistence` over sites, each block's greatest rho."""
    left: Mapping[str, float] = field(default_factory=dict)
    """With this rule, the groups that it left in this round, with the rho that decided."""
    returned: Mapping[str, float] = field(default_factory=dict)
    """The groups that it returned to in this round, with the gain that decided."""
    stayed: Mapping[str, float] = field(default_factory=dict)
    """The groups in which it was in conflict and stays, since sharing is no worse, with the rho of the conflict."""
    comparison: Mapping[str, float] = field(default_factory=dict)
    """What its clients saw when they played with its own blocks and with the server's, as in a client's record."""


@dataclass(frozen=True)
class RoundRecord:
    """Records what happened in a round."""

    round: int
    """From 1; 0 is the evaluation before the first round."""
    rounds: int
    """How many rounds the run has."""
    seconds: float
    """Seconds of the round's training and of the server's step."""
    env_steps: int
    """Environment steps of all clients since the run began."""
    clients: Sequence[ClientRecord]
    """All clients of which anything is known in this round."""
    server: ServerRecord | None = None
    """The server's part; None without a federation."""
    sites: tuple[SiteRecord, ...] = ()
    """All sites; empty where the server merges all clients."""
    logged: Mapping[str, float] = field(default_factory=dict)
    """What callbacks have logged of the whole, by key."""
    scales: Mapping[str, ReturnScale] = field(default_factory=dict)
    """The scale of each entry's returns; empty if all clients have the same, so that returns can be averaged."""

    @property
    def steps(self) -> int:
        """Environment steps of all clients in this round."""
        return sum(record.steps for record in self.clients)

    @property
    def returns(self) -> dict[str, float]:
        """Mean return of each client's training episodes."""
        return {record.client: record.mean for record in self.clients if record.mean is not None}

    @property
    def scores(self) -> dict[str, float]:
        """Mean return of each client's evaluation episodes after the round; empty if there was no evaluation."""
        return {record.client: record.score for record in self.clients if record.score is not None}

    @property
    def equal(self) -> tuple[str, ...]:
        """Clients that could learn nothing, since every group of their completions was rewarded equally."""
        return tuple(record.client for record in self.clients if has_equal_groups_alone(record.metrics))

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for a person: the server's, on clients that could learn nothing, and on those that sharing costs."""
        costs = note_costs(self.round, {record.client: record.metrics for record in self.clients})
        more = (note for note in (equal_groups_note(self.equal), costs) if note)
        return (*(() if self.server is None else self.server.notes), *more)


def list_differences(departed: Sequence[str], clusters: Mapping[str, int]) -> list[str]:
    """List what a client does not share with most others: parameter groups that it has left, and blocks that it shares
    in another cluster than 0, the one with the greatest weight.
    """
    return [*departed, *(f"{block} #{cluster}" for block, cluster in clusters.items() if cluster)]


# A line of rounds.jsonl ----------------------------------------------------------------------------------------------


def record_to_line(record: RoundRecord) -> dict[str, Any]:
    """Make a round's line: metrics of the whole, and under `clients` each client's by the same keys.

    A number that is unknown or not finite is null.
    """
    clients = {client.client: _client_metrics(client) for client in record.clients}
    trained = [client for client in record.clients if client.trains]
    return {
        "round": record.round,
        ENV_STEPS: record.env_steps,
        ROUND_SECONDS: round(record.seconds, 4),
        STEPS_PER_SECOND: finite_or_none(record.steps / max(record.seconds, 1e-9)),
        **score_metrics([(client.task, clients[client.client]) for client in trained], record.scales),
        **mean_metrics([clients[client.client] for client in trained], not record.scales),
        **mean_metrics([_adaptation(client) for client in adapted_clients(record.clients)], not record.scales),
        **_task_metrics(record),
        **({} if record.server is None else _server_metrics(record.server, record.clients, record.sites)),
        **_site_lines(record, clients),
        **finite_values(record.logged),
        **({"notes": list(record.notes)} if record.notes else {}),
        "clients": clients
        if record.server is None
        else {client.client: _client_line(client, clients[client.client]) for client in record.clients},
    }


def _client_metrics(record: ClientRecord) -> dict[str, float | None]:
    """Select the client's metrics that the line averages for the whole."""
    score = {EVALUATION_RETURN: record.score, **_adaptation(record), **finite_values(record.logged)}
    if record.cost is not None:
        score[EVALUATION_COST] = finite_or_none(record.cost)
    if record.age is not None:
        score[STALENESS] = float(record.age)
    if not record.steps:
        return score
    training = {TRAINING_RETURN: None, TRAINING_LENGTH: None, TRAINING_EPISODES: record.episodes, **record.metrics}
    return {**score, **{key: finite_or_none(value) for key, value in training.items()}}


def adapted_clients(records: Sequence[ClientRecord]) -> list[ClientRecord]:
    """Choose the clients whose adaptation counts: those that take no part in training, or all if there are none."""
    return [record for record in records if not record.trains] or list(records)


def _adaptation(record: ClientRecord) -> dict[str, float | None]:
    """Make the metrics of a client that was adapted: its return before, after each local update, and after the last."""
    if not record.adapted:
        return {}
    curve = {f"{ADAPTATION}{updates}": value for updates, value in enumerate((record.score, *record.adapted))}
    return {key: finite_or_none(value) for key, value in {ADAPTED_RETURN: record.adapted[-1], **curve}.items()}


def _task_metrics(record: RoundRecord) -> dict[str, float | None]:
    """Average the scores of each entry of the scenario over its clients."""
    scores: dict[str, list[float]] = {}
    for client in record.clients:
        if client.score is not None:
            scores.setdefault(client.task, []).append(client.score)
    return {f"task/{task}": mean_of_known(values) for task, values in scores.items()}


def _server_metrics(
    server: ServerRecord, clients: Sequence[ClientRecord], sites: Sequence[SiteRecord]
) -> dict[str, Any]:
    """Make the metrics of the whole in a federation."""
    line: dict[str, Any] = {
        CLIENTS_OK: sum(client.steps > 0 and client.failure is None for client in clients),
        CLIENTS_FAILED: sum(client.failure is not None for client in clients),
        DEPARTED_GROUPS: sum(len(client.departed) for client in clients),
        MB_UP: server.bytes_up / MB,
        MB_DOWN: server.bytes_down / MB,
        MB_TOTAL: server.bytes_total / MB,
    }
    for block in dict.fromkeys(block for client in clients for block in client.clusters):
        line[f"clusters/{block}"] = len({client.clusters[block] for client in clients if client.clusters})
    if server.step is not None and server.step.blocks:
        line |= _step_metrics(server.step)
    if server.merge_length is not None:
        line[MERGE_LENGTH] = server.merge_length
    if server.virtual_seconds is not None:
        line[VIRTUAL_SECONDS] = server.virtual_seconds
    if server.privacy is not None:
        line |= server.privacy.metrics
    line |= {f"last_kl/{name}": finite_or_none(kl) for name, kl in server.last_kl.items()}
    comparisons = [*(client.comparison for client in clients), *(site.comparison for site in sites)]
    played = sum(comparison.get("episodes", 0) for comparison in comparisons)
    if server.rho_limit is not None:
        line[RHO_LIMIT] = server.rho_limit
    if server.rho_limit is not None or played:
        line[COMPARISON_EPISODES] = played
    for block in dict.fromkeys(block for client in clients for block in client.rho):
        line[f"rho/{block}"] = four_digits(max(client.rho[block] for client in clients if block in client.rho))
    return line


def _step_metrics(step: AcceptedStep) -> dict[str, float | None]:
    """Make the metrics of a step: KL, budget and fraction of each block and of all blocks together."""
    line: dict[str, float | None] = {}
    for block in step.blocks:
        line |= {
            f"kl/{block.block}": finite_or_none(block.kl),
            f"alpha/{block.block}": block.alpha,
            f"budget/{block.block}": finite_or_none(block.budget),
            f"wanted/{block.block}": finite_or_none(block.wanted),
        }
    line |= {"kl/joint": finite_or_none(step.joint), "budget/joint": finite_or_none(step.joint_budget)}
    return line | {"wanted/joint": finite_or_none(step.joint_wanted)}


def _site_lines(record: RoundRecord, clients: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """Make the sites' part of the line: metrics of each under `site/NAME/`, and under `sites` what it left and why.

    clients: every client's metrics. They are averaged over those of a site, returns only where these have one scale.
    """
    line: dict[str, Any] = {}
    scale_of = {client.client: record.scales.get(client.task) for client in record.clients}
    for site in record.sites:
        of_site = [{key: clients[name].get(key) for key in SITE_MEANS} for name in site.clients if name in clients]
        is_mixed = len({scale_of[name] for name in site.clients if name in clients}) > 1
        means = mean_metrics(of_site, with_returns=not is_mixed)
        metrics: dict[str, float | None] = {key: value for key, value in means.items() if value is not None}
        metrics |= {DEPARTED_GROUPS: len(site.departed)}
        metrics |= {} if site.step is None else _step_metrics(site.step)
        metrics |= {f"rho/{block}": four_digits(value) for block, value in site.rho.items()}
        line |= {f"{SITE}{site.site}/{key}": value for key, value in metrics.items()}
    texts = {site.site: _departure_lines(site) for site in record.sites}
    return line | ({SITES: texts} if texts else {})


def _departure_lines(record: ClientRecord | SiteRecord) -> dict[str, Any]:
    """Make the part of the line that says what a client or a site has left, and why."""
    line: dict[str, Any] = {"personal_groups": list(record.departed)} if record.departed else {}
    tables = {LEFT: record.left, RETURNED: record.returned, STAYED: record.stayed, COMPARISON: record.comparison}
    for key, values in tables.items():
        line |= {key: {group: four_digits(value) for group, value in values.items()}} if values else {}
    return line


def _client_line(record: ClientRecord, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """Make a client's part of the line in a federation."""
    line: dict[str, Any] = {**metrics, DEPARTED_GROUPS: len(record.departed), **_departure_lines(record)}
    line |= {f"cluster/{block}": cluster for block, cluster in record.clusters.items()}
    line |= {f"rho/{block}": four_digits(value) for block, value in record.rho.items()}
    line |= (
        {RHO_BY_GROUP: {name: four_digits(rho) for name, rho in record.rho_by_group.items()}}
        if record.rho_by_group
        else {}
    )
    line |= {"kl/joint": finite_or_none(record.kl)} if record.kl is not None else {}
    line |= {f"last_kl/{name}": finite_or_none(kl) for name, kl in record.last_kl.items()}
    return line | ({"failure": record.failure.kind} if record.failure is not None else {})
