"""A round's merge: answers are added as they arrive, and the target of the shared blocks comes out.

A mean keeps one model in memory however many clients there are. The other rules compare clients, so they keep all
answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from grpo_fed.aggregation.merge.persistence import Evidence, persistence
from grpo_fed.aggregation.merge.rules import PERSISTENCE, bind_rule
from grpo_fed.federation.messages import Trained
from grpo_fed.policy.groups import Groups
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
    clusters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """[B] each: these clients' cluster in every block; 0 is the one with the greatest weight."""
    notes: tuple[str, ...] = ()
    """Messages for a person."""
    evidence: Evidence | None = None
    """With the rule `persistence`, the evidence up to this round."""
    rho: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """With the rule `persistence`, for every client that is compared with others: rho in each group, by its name."""
    left: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """With the rule `persistence`, for every client that leaves groups now: these groups, with the rho that decided."""
    returned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For every client that returns to groups now: these groups, with the gain that decided."""


@final
class RoundMerge:
    """Collects the answers of a round and merges them."""

    def __init__(self, scenario: Scenario, shared_blocks: SharedBlocks, evidence: Evidence | None = None) -> None:
        """Begin a merge; evidence: of the rounds before, for the rule `persistence`."""
        self._settings = scenario.merge
        self._groups = shared_blocks.groups
        self._rule = None if scenario.merge.rule == PERSISTENCE else bind_rule(scenario.merge)
        self._evidence = evidence
        self._ordered = has_ordered_blocks(scenario)
        self.weights: dict[str, float] = {}
        """Each client's weight, in the order of their names."""
        self._mean = StreamingMean()
        self._by_fisher = StreamingFisher()
        self._fisher = StreamingMean()
        self._replies: list[Reply] = []

    def add(self, client: str, trained: Trained) -> None:
        """Add a client's answer.

        Answers come in the order of the clients' names, so that sums do not depend on which client is fastest.
        """
        work = ClientWork(trained.steps, trained.episodes, trained.gain, trained.spread)
        share = self.weights[client] = client_weight(work, self._settings.weights)
        if not trained.point.size:
            return
        point = _tensor(trained.point)
        fisher = None if trained.fisher is None else _tensor(trained.fisher)
        if fisher is not None:
            self._fisher.add(fisher, share)
        if self._settings.rule == "mean":
            self._mean.add(point, share)
        elif self._settings.rule == "fisher":
            assert fisher is not None, f"{client} sent no Fisher diagonal"
            self._by_fisher.add(point, share, fisher)
        else:
            self._replies.append(Reply(client, point, share, fisher))

    def target(self, shared: Tensor) -> MergeTarget:
        """Merge the answers. shared: [S], this round's shared blocks; they are the target if all weights are 0."""
        if not shared.numel() or not any(self.weights.values()):
            return MergeTarget(shared, self.weights, {})
        no_departures: dict[str, tuple[int, ...]] = dict.fromkeys(self.weights, ())
        if self._settings.rule in ("mean", "fisher"):
            point = self._mean.result() if self._settings.rule == "mean" else self._by_fisher.result()
            return MergeTarget(shared if point is None else point, self.weights, no_departures, self._fisher.result())
        replies, evidence, rho, left = Replies.of(self._replies), self._evidence, {}, {}
        if self._rule is not None:
            merged = self._rule(replies, shared, self._groups)
        else:
            assert evidence is not None, "the rule persistence has evidence"
            before = evidence.departed
            merged, evidence, by_group = persistence(replies, shared, self._groups, evidence, self._ordered)
            rho = _name_values(by_group, ~by_group.isnan(), evidence, self._groups)
            left = _name_values(by_group, evidence.departed & ~before, evidence, self._groups)
        return MergeTarget(
            merged.point,
            self.weights,
            {name: _indices(departed) for name, departed in zip(merged.clients, merged.departed, strict=True)},
            self._fisher.result(),
            _targets(merged),
            _clusters(merged),
            merged.notes,
            evidence,
            rho,
            left,
        )


def has_ordered_blocks(scenario: Scenario) -> bool:
    """Decide whether the shared blocks follow each other from input to output, so that consequences lag.

    Those of our network do, unless the critic has a torso of its own.
    """
    return scenario.policy.module is None and scenario.policy.torso == "shared"


def _tensor(array: np.ndarray) -> Tensor:
    """Make a tensor of an array, in the same memory unless that is read-only, which torch does not know."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _indices(chosen: Tensor) -> tuple[int, ...]:
    """Return the indices of the true entries of [G] bool."""
    return tuple(chosen.nonzero().squeeze(1).tolist())


def _name_values(values: Tensor, chosen: Tensor, evidence: Evidence, groups: Groups) -> dict[str, dict[str, float]]:
    """Name the chosen values by client and group. values: [K, G]; chosen: [K, G] bool."""
    named: dict[str, dict[str, float]] = {}
    places = chosen.nonzero()
    for (row, group), value in zip(places.tolist(), values[chosen].tolist(), strict=True):
        named.setdefault(evidence.clients[row], {})[groups.names[group]] = value
    return named


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
