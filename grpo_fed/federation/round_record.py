"""A round as a record, for `rounds.jsonl`, displays and MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from grpo_fed.aggregation.merge.conflicts import PAYS
from grpo_fed.aggregation.merge.persistence import Findings
from grpo_fed.federation.messages import SharingComparison, Trained
from grpo_fed.federation.server import Aggregation, Server
from grpo_fed.federation.server_state import ServerState
from grpo_fed.federation.sites import SiteTree
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.evaluations import Evaluations
from grpo_fed.runs.records import ClientRecord, Failure, RoundRecord, ServerRecord, SiteRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.tasks.scores import scales_of

SEEN = ("own", "shared", "error", "learned", "episodes")
"""What a record has of a client's comparison."""
MOST_RHO = 1000
"""Clients x groups up to which a record has rho in every group. With more it has each block's greatest alone: otherwise
1,000 clients and 200 groups would add megabytes to each line of `rounds.jsonl`."""


@dataclass(frozen=True)
class Traffic:
    """Counts the bytes between server and clients."""

    up: int
    """Bytes that came from clients since the last round's record."""
    down: int
    """Bytes that went to clients since then."""
    total: int
    """Bytes both ways since the run began."""


@dataclass(frozen=True)
class RoundOutcome:
    """Collects what happened in a round, for its record."""

    round: int
    seconds: float = 0.0
    """Seconds of training and of the server's step."""
    replies: Mapping[str, Trained] = field(default_factory=dict)
    """The clients' answers, without the vectors that have been merged."""
    aggregation: Aggregation | None = None
    """None if there was no merge."""
    last_kl: Mapping[str, float] = field(default_factory=dict)
    """KL of the last round's step, as clients measured it in this round."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    """The first failure of each client in this round."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    """The clients' evaluations after the round; empty if there was none, or not yet."""
    notes: tuple[str, ...] = ()
    """Messages for a person, beside those of the aggregation."""
    ages: Mapping[str, int] = field(default_factory=dict)
    """For each answer, the merges since its client began; empty if the server waits for all."""
    length: float | None = None
    """The part of the way to the merge that the shared blocks might go; None if the server waits for all."""
    virtual_seconds: float | None = None
    """Virtual seconds since the run began; None where clients have no paces of their own."""


def make_round_record(
    outcome: RoundOutcome,
    scenario: Scenario,
    shared_blocks: SharedBlocks,
    server: Server | SiteTree,
    env_steps: int,
    traffic: Traffic,
) -> RoundRecord:
    """Make a round's record.

    server: the server after the round. env_steps: environment steps of all clients before the round.
    """
    entries = {name: settings for settings in scenario.clients for name in settings.names}
    aggregation = outcome.aggregation
    step = None if aggregation is None else aggregation.step.accepted
    notes = outcome.notes if aggregation is None else (*outcome.notes, *aggregation.notes)
    return RoundRecord(
        round=outcome.round,
        rounds=scenario.rounds,
        seconds=outcome.seconds,
        env_steps=env_steps + sum(reply.steps for reply in outcome.replies.values()),
        clients=[
            _client_record(name, entries[name], outcome, shared_blocks, server.state_of(name))
            for name in shared_blocks.clients
        ],
        server=ServerRecord(
            step,
            outcome.last_kl,
            traffic.up,
            traffic.down,
            traffic.total,
            notes,
            rho_limit=PAYS if aggregation is not None and _has_rho(aggregation) else None,
            merge_length=outcome.length,
            virtual_seconds=outcome.virtual_seconds,
            privacy=server.privacy,
        ),
        sites=_site_records(server, aggregation, shared_blocks) if isinstance(server, SiteTree) else (),
        scales=scales_of(scenario),
    )


def note_lost_state(client: str, reply: Trained, round: int, trained: int) -> list[str]:
    """Note that a client no longer has the state of the round that it answered for last.

    trained: that round, 0 for none.
    """
    since = round - 1 if reply.since is None else reply.since
    if since >= trained:
        return []
    how = f"went on from its state of round {since}" if since else "began anew"
    return [f"{client} {how}: it no longer has that of round {trained}"]


def _client_record(
    client: str, entry: ClientSettings, outcome: RoundOutcome, shared_blocks: SharedBlocks, state: ServerState
) -> ClientRecord:
    reply, aggregation = outcome.replies.get(client), outcome.aggregation
    findings = Findings() if aggregation is None else aggregation.findings
    rho = _named_rho(findings.rho.get(client), shared_blocks)
    comparison = None if reply is None else reply.comparison
    return ClientRecord(
        client=client,
        task=entry.name,
        steps=0 if reply is None else reply.steps,
        episodes=0 if reply is None else reply.episodes,
        metrics={} if reply is None else dict(reply.metrics),
        score=outcome.evaluations.scores.get(client),
        kl=None if aggregation is None else aggregation.step.kl.get(client),
        last_kl=_named_kl(reply, shared_blocks),
        departed=name_groups(shared_blocks, state.departed.get(client, ())),
        clusters=name_clusters(shared_blocks, state.clusters.get(client)),
        rho=_greatest_by_block(rho, shared_blocks),
        rho_by_group=rho if _has_rho_by_group(shared_blocks) else {},
        **_moves(client, findings, comparison, shared_blocks),
        failure=outcome.failures.get(client),
        age=outcome.ages.get(client),
        adapted=outcome.evaluations.adapted.get(client, ()),
        trains=entry.trains,
        cost=outcome.evaluations.costs.get(client),
    )


def _named_kl(reply: Trained | None, shared_blocks: SharedBlocks) -> dict[str, float]:
    """Name the KL [1 + B] of the last round's step that a client has measured; empty if it has not."""
    kl = () if reply is None or reply.kl is None else reply.kl
    return dict(zip(("joint", *shared_blocks.groups.as_blocks.names), kl, strict=True)) if kl else {}


def _site_records(
    server: SiteTree, aggregation: Aggregation | None, shared_blocks: SharedBlocks
) -> tuple[SiteRecord, ...]:
    findings = Findings() if aggregation is None else aggregation.site_findings
    return tuple(
        SiteRecord(
            name,
            site.clients,
            site.step,
            name_groups(shared_blocks, server.state.departed.get(name, ())),
            _greatest_by_block(_named_rho(findings.rho.get(name), shared_blocks), shared_blocks),
            **_moves(name, findings, site.comparison, shared_blocks),
        )
        for name, site in server.sites.items()
    )


def _moves(
    name: str, findings: Findings, comparison: SharingComparison | None, shared_blocks: SharedBlocks
) -> dict[str, dict[str, float]]:
    """Name what a client or a site left, returned to or stayed in, and what it saw when it compared."""
    gain = 0.0 if comparison is None else comparison.shared - comparison.own
    return {
        "left": _name_values(findings.left.get(name, {}), shared_blocks),
        "returned": _name_values(dict.fromkeys(findings.returned.get(name, ()), gain), shared_blocks),
        "stayed": _name_values(findings.stayed.get(name, {}), shared_blocks),
        "comparison": {} if comparison is None else {each: getattr(comparison, each) for each in SEEN},
    }


def _has_rho(aggregation: Aggregation) -> bool:
    """Decide whether some client or site was compared with others."""
    each = (*aggregation.findings.rho.values(), *aggregation.site_findings.rho.values())
    return any(not bool(rho.isnan().all()) for rho in each)


def _named_rho(rho: Tensor | None, shared_blocks: SharedBlocks) -> dict[str, float]:
    """Name rho [G] by group, without NaN."""
    if rho is None:
        return {}
    names = shared_blocks.groups.names
    return {name: value for name, value in zip(names, rho.tolist(), strict=True) if not math.isnan(value)}


def _name_values(values: Mapping[int, float], shared_blocks: SharedBlocks) -> dict[str, float]:
    """Name the groups of some values."""
    return {shared_blocks.groups.names[group]: value for group, value in values.items()}


def _has_rho_by_group(shared_blocks: SharedBlocks) -> bool:
    """Decide whether records have rho in every group: not if the groups are the blocks, or if there are too many."""
    groups, clients = shared_blocks.groups.names, shared_blocks.training_clients
    return groups != shared_blocks.groups.as_blocks.names and len(groups) * len(clients) <= MOST_RHO


def _greatest_by_block(rho: Mapping[str, float], shared_blocks: SharedBlocks) -> dict[str, float]:
    """Find the greatest rho of each block's groups, for the blocks that have one."""
    groups, greatest = shared_blocks.groups, dict[str, float]()
    for group, block in zip(groups.names, groups.blocks, strict=True):
        if group in rho:
            greatest[block] = max(rho[group], greatest.get(block, rho[group]))
    return greatest


def name_groups(shared_blocks: SharedBlocks, groups: Sequence[int]) -> tuple[str, ...]:
    """Name parameter groups by their numbers."""
    return tuple(shared_blocks.groups.names[group] for group in groups)


def name_clusters(shared_blocks: SharedBlocks, clusters: Sequence[int] | None) -> dict[str, int]:
    """Name the blocks of a client's clusters [B]; empty if the latest merge made no clusters or was without it."""
    return {} if clusters is None else dict(zip(shared_blocks.groups.as_blocks.names, clusters, strict=True))
