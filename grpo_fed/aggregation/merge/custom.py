"""A user's own merge rule, whose answer is checked before it is used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grpo_fed.aggregation.merge import (
    Clusters,
    Merged,
    Replies,
    merge_without_departures,
)
from grpo_fed.policy.groups import Groups
from grpo_fed.scenario.importing import import_object
from grpo_fed.scenario.settings import MergeSettings


def custom_rule(settings: MergeSettings) -> Callable[..., Merged]:
    """A rule of the user's, whose answer is looked at before anybody uses it."""
    where = f"merge.rule = {settings.rule}"
    try:
        rule = import_object(settings.rule)
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
        wrong = _problem(said, replies, shared, groups)
        if wrong:
            raise ValueError(f"{where}: {wrong}")
        if not isinstance(said, Merged):  # a rule by which nobody departs may say where the blocks should go alone
            said = merge_without_departures(replies, said, groups)
        return replace(said, point=said.point.to(shared.dtype))

    return merge


def _problem(found: object, replies: Replies, shared: Tensor, groups: Groups) -> str:
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
        return _cluster_problem(found.clusters, len(replies.all), shared, groups)
    return ""


def _cluster_problem(found: Clusters, clients: int, shared: Tensor, groups: Groups) -> str:
    wanted = clients, len(groups.as_blocks.names)
    if found.blocks != groups.as_blocks.names:
        return f"has clusters of the blocks {', '.join(found.blocks)}; they must be {', '.join(groups.as_blocks.names)}"
    if found.members.shape != wanted or found.members.dtype != torch.int64:
        return f"has members as {found.members.dtype} of shape {tuple(found.members.shape)}; int64 {wanted} fits"
    if found.points.ndim != 2 or found.points.shape[1:] != shared.shape or not found.points.isfinite().all():
        return f"has clusters' points of shape {tuple(found.points.shape)}; finite ones of (C, {shared.numel()}) fit"
    if found.members.numel() and not 0 <= int(found.members.min()) <= int(found.members.max()) < len(found.points):
        return f"has members in clusters that are not among its {len(found.points)}"
    return ""
