"""What all clients of a federation have in common: the shared blocks, as one vector [S] of their own.

Clients may be as unlike as their tasks are; where they share a block, it has the same name and shapes for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grpo_fed import words
from grpo_fed.blocks import Block, Layout
from grpo_fed.groups import Groups, groups_of
from grpo_fed.policy import Policy, policy_for
from grpo_fed.scenario import Scenario
from grpo_fed.tasks import Task, tasks_of

ALL = "*"
"""The pattern of `policy.shared` that means: whatever can be shared."""


@dataclass(frozen=True, eq=False)
class Commons:
    """S shared parameters in B blocks and G groups."""

    clients: tuple[str, ...]
    """All, in the scenario's order."""
    layout: Layout
    """Of the shared blocks alone, [S] columns."""
    groups: Groups
    """What a merge lets a client keep or drop as one; every column is in one."""
    first: Tensor
    """[S]: where the federation begins."""

    @property
    def size(self) -> int:
        """S."""
        return self.layout.size

    @property
    def blocks(self) -> tuple[str, ...]:
        """[B]: their names."""
        return tuple(block.name for block in self.layout.blocks)

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """Where each block lies."""
        return {block.name: slice(block.start, block.stop) for block in self.layout.blocks}

    def columns(self, layout: Layout) -> Tensor:
        """[S] int64: where the shared parameters lie in a client's own layout."""
        own = {block.name: block for block in layout.blocks}
        parts = [torch.arange(own[name].start, own[name].stop) for name in self.blocks]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])

    def kept(self, personal: Sequence[int]) -> Tensor:
        """[S] bool: the columns of these groups."""
        chosen = torch.zeros(len(self.groups.names) + 1, dtype=torch.bool)
        chosen[list(personal)] = True
        return chosen[self.groups.places]


def commons_of(scenario: Scenario) -> Commons:
    """ValueError where a block that the scenario shares by name is not the same for all clients."""
    tasks = tasks_of(scenario)
    policies: dict[tuple[object, ...], tuple[Task, Policy]] = {}
    for task in tasks:
        if task.signature not in policies:
            policies[task.signature] = task, policy_for(task, scenario.policy)
    (_, policy), *_ = policies.values()
    alike = [block for block in policy.layout.shared if _is_alike(block, list(policies.values()), scenario)]
    layout = policy.layout.part(alike)
    start = policy.initial(scenario.seed)
    first = torch.cat([start[:0], *(start[block.start : block.stop] for block in alike)])
    groups = _cut(groups_of(policy.layout, scenario.policy.groups, only=alike), first.numel(), policy.layout, alike)
    return Commons(tuple(task.client for task in tasks), layout, groups, first)


def _is_alike(block: Block, policies: Sequence[tuple[Task, Policy]], scenario: Scenario) -> bool:
    """Whether every client has this block in the same shapes."""
    shapes = [slot.shape for slot in block.slots]
    for task, policy in policies[1:]:
        own = next((other for other in policy.layout.blocks if other.name == block.name), None)
        if own is not None and [slot.shape for slot in own.slots] == shapes:
            continue
        if ALL in scenario.policy.shared:
            return False
        has = "no such block" if own is None else f"shapes {words.show([slot.shape for slot in own.slots])}"
        raise ValueError(
            f"policy.shared takes block {block.name}, of shapes {words.show(shapes)} for client {policies[0][0].client}"
            f" but {has} for client {task.client} ({task.env}): leave it out, or set policy.adapter so that what"
            ' follows an unlike observation has one shape; "*" shares whatever is alike'
        )
    return True


def _cut(groups: Groups, size: int, layout: Layout, blocks: Sequence[Block]) -> Groups:
    """The groups with the columns of these blocks alone."""
    ids = groups.ids[layout.mask(blocks)]
    assert ids.numel() == size, "every shared column is kept"
    return Groups(groups.names, ids, groups.sizes, groups.blocks)
