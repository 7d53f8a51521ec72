"""Imports a user's own merge rule, and checks its results before they are used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grpo_fed.aggregation.merge import Clusters, Merged, Replies, merge_without_departures
from grpo_fed.policy.groups import Groups
from grpo_fed.scenario.importing import import_object
from grpo_fed.scenario.settings import MergeSettings


def custom_rule(settings: MergeSettings) -> Callable[..., Merged]:
    """Import the user's rule `merge.rule`, and return it with its arguments bound and its results checked.

    The rule may return a point [P] alone, where no client departs, instead of `Merged`.

    Raises a ValueError where it cannot be imported or called; what is returned raises one where the rule fails or its
    result does not fit.
    """
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
            result = rule(replies, shared, groups, **settings.kwargs)
        except Exception as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        problem = _find_problem(result, replies, shared, groups)
        if problem:
            raise ValueError(f"{where}: {problem}")
        if not isinstance(result, Merged):
            result = merge_without_departures(replies, result, groups)
        return replace(result, point=result.point.to(shared.dtype))

    return merge


def _find_problem(result: object, replies: Replies, shared: Tensor, groups: Groups) -> str:
    """Describe what does not fit in a rule's result; empty if all fits."""
    point = result.point if isinstance(result, Merged) else result
    if not isinstance(point, Tensor):
        return f"made a {type(point).__name__}; it must make a tensor or a grpo_fed.aggregation.merge.Merged"
    if point.shape != shared.shape:
        return f"made a point of shape {tuple(point.shape)}; the shared blocks have {tuple(shared.shape)}"
    if not point.isfinite().all():
        return "made a point that is not finite"
    if not isinstance(result, Merged):
        return ""
    fits = len(replies.all), len(groups.names)
    departed = result.departed
    if result.clients != replies.clients:
        return "names other clients, or in another order, than replies.clients"
    if departed.shape != fits or departed.dtype != torch.bool:
        return f"has departed as {departed.dtype} of shape {tuple(departed.shape)}; bool {fits} fits"
    if result.clusters is not None:
        return _find_cluster_problem(result.clusters, len(replies.all), shared, groups)
    return ""


def _find_cluster_problem(clusters: Clusters, clients: int, shared: Tensor, groups: Groups) -> str:
    """Describe what does not fit in the clusters of a rule's result; empty if all fits."""
    blocks, members, points = groups.as_blocks.names, clusters.members, clusters.points
    fits = clients, len(blocks)
    if clusters.blocks != blocks:
        return f"has clusters of the blocks {', '.join(clusters.blocks)}; they must be {', '.join(blocks)}"
    if members.shape != fits or members.dtype != torch.int64:
        return f"has members as {members.dtype} of shape {tuple(members.shape)}; int64 {fits} fits"
    if points.ndim != 2 or points.shape[1:] != shared.shape or not points.isfinite().all():
        return f"has clusters' points of shape {tuple(points.shape)}; finite ones of (C, {shared.numel()}) fit"
    if members.numel() and not 0 <= int(members.min()) <= int(members.max()) < len(points):
        return f"has members in clusters that are not among its {len(points)}"
    return ""
