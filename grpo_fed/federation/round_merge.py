"""A round's merge: answers are added as they arrive, and the target of the shared blocks comes out.

A mean keeps one model in memory however many clients there are. The other rules compare clients, so they keep all
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import (
    ClientWork,
    Merged,
    Replies,
    Reply,
    StreamingFisher,
    StreamingMean,
    client_weight,
)
from grpo_fed.aggregation.merge.clustering import ClusterEvidence, clusters
from grpo_fed.aggregation.merge.evidence import Evidence
from grpo_fed.aggregation.merge.persistence import Asking, Findings, Heard, persistence
from grpo_fed.aggregation.merge.rules import RULES_WITH_EVIDENCE, bind_rule
from grpo_fed.aggregation.merge.zeros import StreamingZeros, keep_zeros, set_to_zero
from grpo_fed.federation.messages import Trained
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True, eq=False)
class MergeTarget:
    """Holds the point that a merge wants the shared blocks to move to."""

    point: Tensor
    """[S] float32."""
    weights: Mapping[str, float]
    """The weight of every client that answered."""
    departed: Mapping[str, tuple[int, ...]]
    """For every client that answered, the parameter groups that it has left; it shares all others."""
    fisher: Tensor | None = None
    """[S]: the mean Fisher diagonal; None if no client sent one or all weights are 0."""
    points: Mapping[str, Tensor] = field(default_factory=dict)
    """[S] each, with the rule `clusters`: the target of every client that answered, instead of `point` for all."""
    absent: Mapping[str, Tensor] = field(default_factory=dict)
    """[S] each, with the rule `clusters`: the targets of clients that did not answer, where their clusters did."""
    clusters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """[B] each: these clients' cluster in every block; 0 is the one with the greatest weight."""
    notes: tuple[str, ...] = ()
    """Messages for a person."""
    evidence: Evidence | ClusterEvidence | None = None
    """With the rules `persistence` and `clusters`, the evidence up to this round."""
    findings: Findings = field(default_factory=Findings)
    """With the rule `persistence`, what this merge found out about the clients."""


@final
class RoundMerge:
    """Collects the answers of a round and merges them."""

    def __init__(
        self,
        scenario: Scenario,
        shared_blocks: SharedBlocks,
        evidence: Evidence | ClusterEvidence | None = None,
        start_of: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Begin a merge.

        evidence: of the rounds before, for the rules `persistence` and `clusters`. start_of: returns the shared blocks
        [S] that a client began with; by default all begin with those that `target` is given.
        """
        self._settings = scenario.merge
        self._groups = shared_blocks.groups
        self._rule = None if scenario.merge.rule in RULES_WITH_EVIDENCE else bind_rule(scenario.merge)
        self._evidence = evidence
        self._start_of = start_of if isinstance(evidence, ClusterEvidence) else None
        """Clients begin with different blocks where they are in clusters."""
        self._shares: dict[str, bool] = {}
        self._low: set[str] = set()
        self.weights: dict[str, float] = {}
        """Each client's weight, in the order of their names."""
        self._mean = StreamingMean()
        self._by_fisher = StreamingFisher()
        self._fisher = StreamingMean()
        self._replies: list[Reply] = []
        self._penalised = penalised_groups(scenario, shared_blocks)
        self._zeros = StreamingZeros(self._groups)

    def add(self, client: str, trained: Trained) -> None:
        """Add a client's answer.

        Answers come in the order of the clients' names, so that sums do not depend on which client is fastest.
        """
        work = ClientWork(trained.steps, trained.episodes, trained.gain, trained.spread)
        share = self.weights[client] = client_weight(work, self._settings.weights)
        if trained.comparison is not None:
            self._shares[client] = trained.comparison.shares
        if trained.low:
            self._low.add(client)
        if not trained.point.size:
            return
        point = _tensor(trained.point)
        fisher = None if trained.fisher is None else _tensor(trained.fisher)
        if fisher is not None:
            self._fisher.add(fisher, share)
        if self._penalised.any() and self._settings.rule in ("mean", "fisher"):
            self._zeros.add(point, share)
        if self._settings.rule == "mean":
            self._mean.add(point, share)
        elif self._settings.rule == "fisher":
            assert fisher is not None, f"{client} sent no Fisher diagonal"
            self._by_fisher.add(point, share, fisher)
        else:
            start = self._start_of(client) if self._start_of is not None else None
            self._replies.append(Reply(client, point, share, fisher, start))

    def target(self, shared: Tensor) -> MergeTarget:
        """Merge the answers. shared: [S], this round's shared blocks; they are the target if all weights are 0."""
        if not shared.numel() or not any(self.weights.values()):
            return MergeTarget(shared, self.weights, {})
        no_departures: dict[str, tuple[int, ...]] = dict.fromkeys(self.weights, ())
        if self._settings.rule in ("mean", "fisher"):
            point = self._mean.result() if self._settings.rule == "mean" else self._by_fisher.result()
            if point is not None and self._penalised.any():
                point = set_to_zero(point, self._zeros.result() & self._penalised, self._groups)
            return MergeTarget(shared if point is None else point, self.weights, no_departures, self._fisher.result())
        replies, evidence, findings = Replies.of(self._replies), self._evidence, Findings()
        if self._rule is not None:
            merged = self._rule(replies, shared, self._groups)
        elif isinstance(evidence, ClusterEvidence):
            merged, evidence = clusters(replies, shared, self._groups, evidence, self._settings.most)
        else:
            assert evidence is not None, "rules with evidence are given it"
            asking = Asking(self._settings.confirm == "returns", self._settings.rejoin)
            heard = Heard(self._shares, self._low)
            merged, evidence, findings = persistence(replies, shared, self._groups, evidence, asking, heard)
        if self._penalised.any():
            merged = keep_zeros(merged, replies, self._penalised, self._groups)
        return MergeTarget(
            merged.point,
            self.weights,
            {name: _indices(departed) for name, departed in zip(merged.clients, merged.departed, strict=True)},
            self._fisher.result(),
            points=_targets(merged),
            absent=merged.absent,
            clusters=_clusters(merged),
            notes=merged.notes,
            evidence=evidence,
            findings=findings,
        )


def penalised_groups(scenario: Scenario, shared_blocks: SharedBlocks) -> Tensor:
    """The shared parameter groups that a penalty moves towards zero, [G] bool."""
    penalty, groups = scenario.penalty, shared_blocks.groups
    weights = [penalty.weight if entry.penalty is None else entry.penalty for entry in scenario.clients]
    if penalty.toward != "zero" or not (any(weights) or penalty.l1 or penalty.outer):
        return torch.zeros(len(groups.names), dtype=torch.bool)
    chosen = {block for block in shared_blocks.blocks if any(fnmatchcase(block, pattern) for pattern in penalty.blocks)}
    return torch.tensor([block in chosen for block in groups.blocks], dtype=torch.bool)


def _tensor(array: np.ndarray) -> Tensor:
    """Make a tensor of an array, in the same memory unless that is read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _indices(chosen: Tensor) -> tuple[int, ...]:
    """Return the indices of the true entries of [G] bool."""
    return tuple(chosen.nonzero().squeeze(1).tolist())


def _targets(merged: Merged) -> dict[str, Tensor]:
    """Return each client's target; empty if it is the same for all."""
    if merged.clusters is None:
        return {}
    return {name: merged.clusters.point(index) for index, name in enumerate(merged.clients)}


def _clusters(merged: Merged) -> dict[str, tuple[int, ...]]:
    """Return each client's cluster in every block; empty without clusters."""
    if merged.clusters is None:
        return {}
    return {
        name: tuple(clusters) for name, clusters in zip(merged.clients, merged.clusters.members.tolist(), strict=True)
    }
