"""A round's merge: replies go in as they come, and out comes where the shared blocks should go.

A mean keeps one model in memory however many clients there are. The other rules compare clients, and keep them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.commons import Commons
from grpo_fed.merge import RULES, Effort, Merged, Replies, Reply, StreamingFisher, StreamingMean, weight
from grpo_fed.merge.departure import limits
from grpo_fed.messages import Trained
from grpo_fed.scenario import MergeSettings, Scenario


@dataclass(frozen=True, eq=False)
class Target:
    """Where a merge wants the shared blocks to go."""

    point: Tensor
    """[S] float32."""
    weights: Mapping[str, float]
    """Of every client that replied."""
    personal: Mapping[str, tuple[int, ...]]
    """Of clients that replied, the groups that they leave; they are in all others again."""
    fisher: Tensor | None = None
    """[S]: the replies' mean Fisher diagonal; None if none was sent or nobody has a weight."""
    points: Mapping[str, Tensor] = field(default_factory=dict)
    """By the rule `clusters`: what each client that replied is merged into, instead of `point` for all."""
    notes: tuple[str, ...] = ()
    """What a person should know about it."""


@final
class Merging:
    """One round's."""

    def __init__(self, scenario: Scenario, commons: Commons) -> None:
        self._settings = scenario.merge
        self._groups = commons.groups
        self._rule = rule_of(scenario.merge)
        self.weights: dict[str, float] = {}
        """By client, in the order of their names."""
        self._mean = StreamingMean()
        self._by_fisher = StreamingFisher()
        self._fisher = StreamingMean()
        self._replies: list[Reply] = []

    def add(self, client: str, trained: Trained) -> None:
        """A client's reply; they come in the order of their names, so that sums are the same whoever is first."""
        effort = Effort(trained.steps, trained.episodes, trained.gain, trained.spread)
        own = self.weights[client] = weight(effort, self._settings.weights)
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

    def target(self, shared: Tensor) -> Target:
        """Where all of it goes, from the shared blocks [S] of this round; if nobody has a weight, all stays."""
        if not shared.numel() or not any(self.weights.values()):
            return Target(shared, self.weights, {})
        nobody: dict[str, tuple[int, ...]] = dict.fromkeys(self.weights, ())
        if self._settings.rule in ("mean", "fisher"):
            point = self._mean.result() if self._settings.rule == "mean" else self._by_fisher.result()
            return Target(shared if point is None else point, self.weights, nobody, self._fisher.result())
        merged = self._rule(Replies.of(self._replies), shared, self._groups)
        return Target(
            merged.point,
            self.weights,
            {name: _chosen(left) for name, left in zip(merged.clients, merged.departed, strict=True)},
            self._fisher.result(),
            _points(merged),
            merged.notes,
        )


def check(settings: MergeSettings, commons: Commons) -> None:
    """ValueError for patterns of blocks that take no shared block, or one twice; where nothing is shared they rest."""
    if commons.size:
        limits(commons.groups, 0.0, unlimited(settings.blocks))


def rule_of(settings: MergeSettings) -> Callable[..., Merged]:
    """The scenario's rule with the scenario's knobs."""
    infinite = float("inf")
    match settings.rule:
        case "huber":
            threshold = infinite if settings.threshold is None else settings.threshold
            own = MappingProxyType(unlimited(settings.blocks))
            return partial(RULES["huber"], threshold=threshold, blocks=own, refit=settings.refit)
        case "trimmed-mean":
            return partial(RULES["trimmed-mean"], fraction=settings.fraction)
        case "krum":
            return partial(RULES["krum"], byzantine=settings.byzantine, keep=settings.keep)
        case "clusters":
            return partial(RULES["clusters"], structure=settings.structure, most=settings.most)
        case rule:
            return RULES[rule]


def unlimited(bounds: Mapping[str, float | None]) -> dict[str, float]:
    """None, which is no limit, as infinity."""
    return {name: float("inf") if bound is None else bound for name, bound in bounds.items()}


def _tensor(array: np.ndarray) -> Tensor:
    """In the same memory, unless that may not be written to: torch has no such tensors."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _chosen(left: Tensor) -> tuple[int, ...]:
    """[G] bool -> the numbers of those that are true."""
    return tuple(left.nonzero().squeeze(1).tolist())


def _points(merged: Merged) -> dict[str, Tensor]:
    """What each client is merged into, where that is not the same for all."""
    if merged.clusters is None:
        return {}
    return {name: merged.clusters.point(number) for number, name in enumerate(merged.clients)}
