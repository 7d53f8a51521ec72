"""A round's merge: replies go in as they come, and out comes where the shared blocks should go.

A mean keeps one model in memory however many clients there are. The other rules compare clients, and keep them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import (
    RULES,
    Clusters,
    Effort,
    Merged,
    Replies,
    Reply,
    StreamingFisher,
    StreamingMean,
    merged,
    weight,
)
from grpo_fed.aggregation.merge.group_lasso import limits
from grpo_fed.federation.messages import Trained
from grpo_fed.policy.groups import Groups
from grpo_fed.policy.shared import Commons
from grpo_fed.scenario.importing import imported
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import MergeSettings
from grpo_fed.scenario.tables import is_own


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
    clusters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """[B] of each such client: its cluster in every block; 0 is the one of most weight."""
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
        found = self._rule(Replies.of(self._replies), shared, self._groups)
        return Target(
            found.point,
            self.weights,
            {name: _chosen(left) for name, left in zip(found.clients, found.departed, strict=True)},
            self._fisher.result(),
            _points(found),
            _members(found),
            found.notes,
        )


def check(settings: MergeSettings, commons: Commons) -> None:
    """ValueError for a rule that cannot be imported, and for patterns of blocks that take no shared block, or one
    twice; where nothing is shared these rest.
    """
    rule_of(settings)
    if commons.size:
        limits(commons.groups, 0.0, unlimited(settings.blocks))


def rule_of(settings: MergeSettings) -> Callable[..., Merged]:
    """The scenario's rule with the scenario's knobs."""
    threshold = float("inf") if settings.threshold is None else settings.threshold
    apart: dict[str, Any] = {"threshold": threshold, "blocks": MappingProxyType(unlimited(settings.blocks))}
    match settings.rule:
        case "huber":
            return partial(RULES["huber"], **apart, refit=settings.refit)
        case "trimmed-mean":
            return partial(RULES["trimmed-mean"], fraction=settings.fraction)
        case "krum":
            return partial(RULES["krum"], byzantine=settings.byzantine, keep=settings.keep)
        case "clusters":
            return partial(RULES["clusters"], **apart, structure=settings.structure, most=settings.most)
        case path if is_own(path):
            return _own(settings)
        case rule:
            return RULES[rule]


def _own(settings: MergeSettings) -> Callable[..., Merged]:
    """A rule of the user's, whose answer is looked at before anybody uses it."""
    where = f"merge.rule = {settings.rule}"
    try:
        rule = imported(settings.rule)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not callable(rule):
        raise ValueError(f"{where}: is a {type(rule).__name__}; it must be a function of replies, shared and groups")
    try:
        inspect.signature(rule).bind(None, None, None, **settings.kwargs)
    except TypeError as error:
        text = f"cannot be called with replies, shared, groups and merge.kwargs = {settings.kwargs}: {error}"
        raise ValueError(f"{where}: {text}") from error

    def merge(replies: Replies, shared: Tensor, groups: Groups) -> Merged:
        try:
            said = rule(replies, shared, groups, **settings.kwargs)
        except Exception as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        wrong = _wrong(said, replies, shared, groups)
        if wrong:
            raise ValueError(f"{where}: {wrong}")
        if not isinstance(said, Merged):  # a rule by which nobody departs may say where the blocks should go alone
            said = merged(replies, said, groups)
        return replace(said, point=said.point.to(shared.dtype))

    return merge


def _wrong(found: object, replies: Replies, shared: Tensor, groups: Groups) -> str:
    """What does not fit in a rule's answer; empty if all does."""
    point = found.point if isinstance(found, Merged) else found
    if not isinstance(point, Tensor):
        return f"made a {type(point).__name__}; it must make a tensor or a grpo_fed.aggregation.merge.Merged"
    if point.shape != shared.shape:
        return f"made a point of shape {tuple(point.shape)}; the shared blocks have {tuple(shared.shape)}"
    if not point.isfinite().all():
        return "made a point that is not finite"
    if not isinstance(found, Merged):
        return ""
    wanted = len(replies.all), len(groups.names)
    if found.clients != replies.clients:
        return "names other clients, or in another order, than replies.clients"
    if found.departed.shape != wanted or found.departed.dtype != torch.bool:
        return f"says who departed as {found.departed.dtype} of shape {tuple(found.departed.shape)}; bool {wanted} fits"
    if found.clusters is not None:
        return _wrong_clusters(found.clusters, len(replies.all), shared, groups)
    return ""


def _wrong_clusters(found: Clusters, clients: int, shared: Tensor, groups: Groups) -> str:
    wanted = clients, len(groups.outer.names)
    if found.blocks != groups.outer.names:
        return f"has clusters of the blocks {', '.join(found.blocks)}; they must be {', '.join(groups.outer.names)}"
    if found.members.shape != wanted or found.members.dtype != torch.int64:
        return f"has members as {found.members.dtype} of shape {tuple(found.members.shape)}; int64 {wanted} fits"
    if found.points.ndim != 2 or found.points.shape[1:] != shared.shape or not found.points.isfinite().all():
        return f"has clusters' points of shape {tuple(found.points.shape)}; finite ones of (C, {shared.numel()}) fit"
    if found.members.numel() and not 0 <= int(found.members.min()) <= int(found.members.max()) < len(found.points):
        return f"has members in clusters that are not among its {len(found.points)}"
    return ""


def unlimited(bounds: Mapping[str, float | None]) -> dict[str, float]:
    """None, which is no limit, as infinity."""
    return {name: float("inf") if bound is None else bound for name, bound in bounds.items()}


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
