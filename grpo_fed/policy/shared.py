"""What all clients of a federation have in common: the shared blocks, as one vector [S] of their own.

Clients may be as unlike as their tasks are; where they share a block, it has the same name and shapes for all. To find
out which they are takes no task, but what each is like: its `Form`. A client that is told which they are needs no more
than its own task.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grpo_fed.policy.base import Policy
from grpo_fed.policy.blocks import Block, Layout
from grpo_fed.policy.groups import Groups, cut_groups
from grpo_fed.policy.make import make_policy, make_policy_from_shape
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import short_toml
from grpo_fed.tasks.envs import episode_step_limit
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.task import Task, TaskShape

ALL = "*"
"""The pattern of `policy.shared` that means: whatever can be shared."""
TASK_SHAPES = "forms"
"""In what an engine notes of a run: by client, what the commons were made of, where not all tasks could be made."""


@dataclass(frozen=True, eq=False)
class SharedBlocks:
    """S shared parameters in B blocks and G groups."""

    clients: tuple[str, ...]
    """All, in the scenario's order."""
    layout: Layout
    """Of the shared blocks alone, [S] columns."""
    groups: Groups
    """What a merge lets a client keep or drop as one; every column is in one."""
    initial: Tensor
    """[S]: where the federation begins."""
    max_episode_steps: int
    """Steps of the longest episode of any of their tasks that is cut; 0 where none is."""

    @property
    def size(self) -> int:
        """S."""
        return self.layout.size

    @property
    def blocks(self) -> tuple[str, ...]:
        """[B]: their names."""
        return tuple(block.name for block in self.layout.blocks)

    @cached_property
    def digest(self) -> str:
        """Of all that messages depend on: who has another one cannot read them."""
        slots = [(slot.block, slot.name, slot.shape) for slot in self.layout.slots]
        told = hashlib.sha256(json.dumps([slots, self.groups.names]).encode())
        told.update(self.groups.ids.numpy().tobytes())
        return told.hexdigest()

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """Where each block lies."""
        return {block.name: slice(block.start, block.stop) for block in self.layout.blocks}

    def columns_in(self, layout: Layout) -> Tensor:
        """[S] int64: where the shared parameters lie in a client's own layout."""
        own = {block.name: block for block in layout.blocks}
        parts = [torch.arange(own[name].start, own[name].stop) for name in self.blocks]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])

    def columns_of_groups(self, personal: Sequence[int]) -> Tensor:
        """[S] bool: the columns of these groups."""
        chosen = torch.zeros(len(self.groups.names) + 1, dtype=torch.bool)
        chosen[list(personal)] = True
        return chosen[self.groups.ids_or_last]


@dataclass(frozen=True)
class _PolicyKind:
    """Clients with equally shaped policies, by the first of them."""

    client: str
    env: str
    policy: Policy


def resolve_shared_blocks(scenario: Scenario, tasks: Sequence[Task] | None = None) -> SharedBlocks:
    """Find the blocks that all clients of a scenario share.

    tasks: all clients' tasks, where they have been resolved already. Raises ValueError where a block that the scenario
    shares by name is not the same for all clients.
    """
    kin: dict[tuple[object, ...], _PolicyKind] = {}
    tasks = resolve_tasks(scenario) if tasks is None else tasks
    for task in tasks:
        if task.signature not in kin:
            kin[task.signature] = _PolicyKind(task.client, task.env, make_policy(task, scenario.policy))
    return _common_to(list(kin.values()), scenario, (task.shape for task in tasks))


def resolve_shared_blocks_from_shapes(scenario: Scenario, forms: Mapping[str, TaskShape]) -> SharedBlocks:
    """The same from the forms of the clients' tasks, without making one; who has none there is not asked.

    ValueError as for `commons_of`. Not for a policy of the user's, which may look at more.
    """
    kin: dict[tuple[object, ...], _PolicyKind] = {}
    for settings in scenario.clients:
        for name in (name for name in settings.names if name in forms):
            form = forms[name]
            signature = form.observation_size, form.kind, form.sizes
            if signature not in kin:
                kin[signature] = _PolicyKind(name, settings.env, make_policy_from_shape(form, scenario.policy))
    return _common_to(list(kin.values()), scenario, forms.values())


def read_task_shapes(noted: Mapping[str, Any]) -> dict[str, TaskShape]:
    """By client, of what an engine noted; none where all tasks could be made."""
    return {
        name: TaskShape(**{**form, "sizes": tuple(form["sizes"])}) for name, form in noted.get(TASK_SHAPES, {}).items()
    }


def resolve_client_shared_blocks(scenario: Scenario, task: Task, blocks: Iterable[str]) -> SharedBlocks:
    """What a client makes of it that knows its own task, and from the server which blocks are shared."""
    policy, names = make_policy(task, scenario.policy), set(blocks)
    shared = [block for block in policy.layout.shared if block.name in names]
    missing = sorted(names - {block.name for block in shared})
    if missing:
        raise ValueError(
            f"client {task.client} ({task.env}): the server shares {short_toml(missing)}, which this client does not;"
            " do both have the same version of grpo_fed?"
        )
    return _build(policy, shared, scenario, [task.shape])


def _common_to(kin: Sequence[_PolicyKind], scenario: Scenario, forms: Iterable[TaskShape]) -> SharedBlocks:
    first = kin[0].policy
    alike = [block for block in first.layout.shared if _is_alike(block, kin, scenario)]
    return _build(first, alike, scenario, forms)


def _build(policy: Policy, shared: Sequence[Block], scenario: Scenario, forms: Iterable[TaskShape]) -> SharedBlocks:
    """Of these blocks of a policy."""
    start = policy.initial(scenario.seed)
    first = torch.cat([start[:0], *(start[block.start : block.stop] for block in shared)])
    groups = cut_groups(policy.layout, scenario.policy.groups, only=shared)
    return SharedBlocks(
        clients=tuple(name for settings in scenario.clients for name in settings.names),
        layout=policy.layout.subset(shared),
        groups=_restrict(groups, first.numel(), policy.layout, shared),
        initial=first,
        max_episode_steps=_longest(forms, scenario),
    )


def _longest(forms: Iterable[TaskShape], scenario: Scenario) -> int:
    """Steps of the longest episode that is cut."""
    return max((episode_step_limit(form, scenario.rollout.episode_limit) for form in forms), default=0)


def _is_alike(block: Block, kin: Sequence[_PolicyKind], scenario: Scenario) -> bool:
    """Whether every client has this block in the same shapes."""
    shapes = [slot.shape for slot in block.slots]
    for one in kin[1:]:
        own = next((other for other in one.policy.layout.blocks if other.name == block.name), None)
        if own is not None and [slot.shape for slot in own.slots] == shapes:
            continue
        if ALL in scenario.policy.shared:
            return False
        has = "no such block" if own is None else f"shapes {short_toml([slot.shape for slot in own.slots])}"
        raise ValueError(
            f"policy.shared takes block {block.name}, of shapes {short_toml(shapes)} for client {kin[0].client}"
            f" but {has} for client {one.client} ({one.env}): leave it out, or set policy.adapter so that what"
            ' follows an unlike observation has one shape; "*" shares whatever is alike'
        )
    return True


def _restrict(groups: Groups, size: int, layout: Layout, blocks: Sequence[Block]) -> Groups:
    """The groups with the columns of these blocks alone."""
    ids = groups.ids[layout.mask(blocks)]
    assert ids.numel() == size, "every shared column is kept"
    return Groups(groups.names, ids, groups.sizes, groups.blocks)
