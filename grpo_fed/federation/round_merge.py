"""A round's merge: replies go in as they come, and out comes where the shared blocks should go.

A mean keeps one model in memory however many clients there are. The other rules compare clients, and keep them all.
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
from grpo_fed.aggregation.merge.rules import bind_rule
from grpo_fed.federation.messages import Trained
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True, eq=False)
class MergeTarget:
    """Where a merge wants the shared blocks to go."""

    point: Tensor
    """[S] float32."""
    weights: Mapping[str, float]
    """Of every client that replied."""
    departed: Mapping[str, tuple[int, ...]]
    """Of clients that replied, the groups that they leave; they are in all others again."""
    fisher: Tensor | None = None
    """[S]: the replies' mean Fisher diagonal; None if none was sent or nobody has a weight."""
    points: Mapping[str, Tensor] = field(default_factory=dict)
    """By the rule `clusters`: what each client that replied is merged into, instead of `point` for all."""
    clusters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """[B] of each such client: its cluster in every block; 0 is the one of most weight."""
    notes: tuple[str, ...] = ()
    """What a person should know about it."""


@final
class RoundMerge:
    """One round's."""

    def __init__(self, scenario: Scenario, commons: SharedBlocks) -> None:
        self._settings = scenario.merge
        self._groups = commons.groups
        self._rule = bind_rule(scenario.merge)
        self.weights: dict[str, float] = {}
        """By client, in the order of their names."""
        self._mean = StreamingMean()
        self._by_fisher = StreamingFisher()
        self._fisher = StreamingMean()
        self._replies: list[Reply] = []

    def add(self, client: str, trained: Trained) -> None:
        """A client's reply; they come in the order of their names, so that sums are the same whoever is first."""
        effort = ClientWork(trained.steps, trained.episodes, trained.gain, trained.spread)
        own = self.weights[client] = client_weight(effort, self._settings.weights)
        if not trained.point.size:
            return
        point = _tensor(trained.point)
        fisher = None if trained.fisher is None else _tensor(trained.fisher)
        if fisher is not None:
            self._fisher.add(fisher, own)
        if self._settings.rule == "mean":
            self._mean.add(point, own)
        elif self._settings.rule == "fisher":
            assert fisher is not None, f"{client} sent no Fisher diagonal"
            self._by_fisher.add(point, own, fisher)
        else:
            self._replies.append(Reply(client, point, own, fisher))

    def target(self, shared: Tensor) -> MergeTarget:
        """Where all of it goes, from the shared blocks [S] of this round; if nobody has a weight, all stays."""
        if not shared.numel() or not any(self.weights.values()):
            return MergeTarget(shared, self.weights, {})
        nobody: dict[str, tuple[int, ...]] = dict.fromkeys(self.weights, ())
        if self._settings.rule in ("mean", "fisher"):
            point = self._mean.result() if self._settings.rule == "mean" else self._by_fisher.result()
            return MergeTarget(shared if point is None else point, self.weights, nobody, self._fisher.result())
        found = self._rule(Replies.of(self._replies), shared, self._groups)
        return MergeTarget(
            found.point,
            self.weights,
            {name: _chosen(left) for name, left in zip(found.clients, found.departed, strict=True)},
            self._fisher.result(),
            _points(found),
            _members(found),
            found.notes,
        )


def _tensor(array: np.ndarray) -> Tensor:
    """In the same memory, unless that may not be written to: torch has no such tensors."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _chosen(left: Tensor) -> tuple[int, ...]:
    """[G] bool -> the numbers of those that are true."""
    return tuple(left.nonzero().squeeze(1).tolist())


def _points(found: Merged) -> dict[str, Tensor]:
    """What each client is merged into, where that is not the same for all."""
    if found.clusters is None:
        return {}
    return {name: found.clusters.point(number) for number, name in enumerate(found.clients)}


def _members(found: Merged) -> dict[str, tuple[int, ...]]:
    """The cluster of each client in every block."""
    if found.clusters is None:
        return {}
    return {name: tuple(own) for name, own in zip(found.clients, found.clusters.members.tolist(), strict=True)}
