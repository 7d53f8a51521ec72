"""Finds the blocks that all clients of a federation share, and lays them out as one vector [S].

Clients may differ as much as their tasks do, but a shared block has the same name and shapes for all of them. A server
that can make every task finds the shared blocks from the tasks; one that cannot finds them from the shapes of the
tasks, which clients report; and a client, which has only its own task, takes their names from the server.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grpo_fed.policy.base import Policy
from grpo_fed.policy.blocks import Block, Layout
from grpo_fed.policy.groups import Groups, cut_groups
from grpo_fed.policy.make import describe_shape, make_policy, make_policy_from_shape
from grpo_fed.policy.shared_names import SharedNames
from grpo_fed.policy.start_values import StartValues, read_server_start
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import short_toml
from grpo_fed.tasks.envs import episode_step_limit
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.task import Task, TaskShape

ALL = "*"
"""The pattern of `policy.shared` for all blocks that have the same shapes for all clients."""
TASK_SHAPES = "forms"
"""The key of an engine's saved state for the task shapes of its clients, where not all tasks could be made."""


@dataclass(frozen=True, eq=False)
class SharedBlocks:
    """S shared parameters in B blocks and G groups."""

    clients: tuple[str, ...]
    """Names of all clients, in the scenario's order."""
    layout: Layout
    """The layout of the shared blocks alone, with S columns."""
    groups: Groups
    """The parameter groups that a client may leave or share as one; every column is in one."""
    initial: Tensor
    """[S]: the parameters that the federation begins with."""
    max_episode_steps: int
    """The greatest step limit of the clients' episodes; 0 where no task has a limit."""
    base: str = ""
    """The digest of the frozen model that the shared blocks adapt; empty where they adapt none."""
    held_out: tuple[str, ...] = ()
    """Names of the clients that take no part in training, in the scenario's order."""

    @property
    def training_clients(self) -> tuple[str, ...]:
        """Names of the clients that take part in training, in the scenario's order."""
        held_out = set(self.held_out)
        return tuple(name for name in self.clients if name not in held_out)

    @property
    def size(self) -> int:
        """S, the number of shared parameters."""
        return self.layout.size

    @property
    def blocks(self) -> tuple[str, ...]:
        """[B]: the names of the shared blocks."""
        return tuple(block.name for block in self.layout.blocks)

    @cached_property
    def names(self) -> SharedNames:
        """The names of blocks and groups, to be kept in a run's folder."""
        return SharedNames(self.blocks, dict(zip(self.groups.names, self.groups.blocks, strict=True)))

    @cached_property
    def digest(self) -> str:
        """A hash of all that messages depend on; a client with another digest cannot decode them."""
        slots = [(slot.block, slot.name, slot.shape) for slot in self.layout.slots]
        digest = hashlib.sha256(json.dumps([slots, self.groups.names, self.base]).encode())
        digest.update(self.groups.ids.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """The columns of each block, by its name."""
        return {block.name: slice(block.start, block.stop) for block in self.layout.blocks}

    def columns_in(self, layout: Layout) -> Tensor:
        """Return the columns of the shared parameters in a client's own layout, [S] int64."""
        block_of = {block.name: block for block in layout.blocks}
        parts = [torch.arange(block_of[name].start, block_of[name].stop) for name in self.blocks]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])

    def columns_of_groups(self, groups: Sequence[int]) -> Tensor:
        """Return which shared parameters lie in these groups, [S] bool."""
        chosen = torch.zeros(len(self.groups.names) + 1, dtype=torch.bool)
        chosen[list(groups)] = True
        return chosen[self.groups.ids_or_last]


def resolve_shared_blocks(scenario: Scenario, tasks: Sequence[Task] | None = None) -> SharedBlocks:
    """Find the shared blocks from all tasks of a scenario.

    tasks: all clients' tasks, if they have been resolved already.

    Raises a ValueError where a block that the scenario shares by name is not the same for all clients.
    """
    tasks = resolve_tasks(scenario) if tasks is None else tasks
    first_of_kind: dict[object, Task] = {}
    for task in tasks:
        first_of_kind.setdefault(task.signature, task)
    policies = [
        _ClientPolicy(task.client, task.description, make_policy(task, scenario.policy))
        for task in first_of_kind.values()
    ]
    return _share_common_blocks(scenario, policies, {task.client: describe_shape(task) for task in tasks})


def resolve_shared_blocks_from_shapes(scenario: Scenario, shapes: Mapping[str, TaskShape]) -> SharedBlocks:
    """Find the shared blocks from the shapes of tasks, without making one.

    shapes: by client; a client that is missing is left out. A user's module may depend on more of a task than its
    shape, so `policy.module` must not be set.

    Raises a ValueError as `resolve_shared_blocks` does.
    """
    task_of = {name: settings.task for settings in scenario.clients for name in settings.names if name in shapes}
    first_of_kind: dict[object, str] = {}
    for client in task_of:
        shape = shapes[client]
        first_of_kind.setdefault(shape.signature, client)
    policies = [
        _ClientPolicy(client, task_of[client], make_policy_from_shape(shapes[client], scenario))
        for client in first_of_kind.values()
    ]
    return _share_common_blocks(scenario, policies, shapes)


def resolve_client_shared_blocks(scenario: Scenario, task: Task, blocks: Iterable[str]) -> SharedBlocks:
    """Find the shared blocks for a client that can make only its own task.

    blocks: the names of the shared blocks, from the server.

    Raises a ValueError where the client's own policy does not share one of them.
    """
    policy, names = make_policy(task, scenario.policy), set(blocks)
    shared = [block for block in policy.layout.shared if block.name in names]
    missing = sorted(names - {block.name for block in shared})
    if missing:
        raise ValueError(
            f"client {task.client} ({task.description}): the server shares {short_toml(missing)}, which this client"
            " does not; do both have the same version of grpo_fed?"
        )
    return _share_blocks(scenario, policy, shared, {task.client: describe_shape(task)})


def read_task_shapes(engine_state: Mapping[str, Any]) -> dict[str, TaskShape]:
    """Read the task shapes by client from an engine's saved state; empty where all tasks could be made.

    ValueError if the state is damaged.
    """
    try:
        shapes = {
            name: TaskShape(**{**shape, "sizes": tuple(shape["sizes"]), "picture": tuple(shape.get("picture", ()))})
            for name, shape in engine_state.get(TASK_SHAPES, {}).items()
        }
        parts = [(shape.observation_size, *shape.sizes, *shape.picture) for shape in shapes.values()]
        numbers = [number for part in parts for number in part]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise TypeError("the sizes are no counts")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the shapes of the tasks that the run saved are damaged: {error}") from None
    return shapes


@dataclass(frozen=True)
class _ClientPolicy:
    """The policy of a client, which stands for all clients with equally shaped policies."""

    client: str
    task: str
    """What the client learns, in a word."""
    policy: Policy


def _share_common_blocks(
    scenario: Scenario, policies: Sequence[_ClientPolicy], shapes: Mapping[str, TaskShape]
) -> SharedBlocks:
    """Share the blocks that the scenario shares and that are the same in all policies."""
    first = policies[0].policy
    common = [block for block in first.layout.shared if _is_common(block, policies, scenario)]
    return _share_blocks(scenario, first, common, shapes, read_server_start(scenario) if common else None)


def _share_blocks(
    scenario: Scenario,
    policy: Policy,
    blocks: Sequence[Block],
    shapes: Mapping[str, TaskShape],
    start: StartValues | None = None,
) -> SharedBlocks:
    """Share these blocks of a policy.

    shapes: of the tasks by client, for the step limits of their episodes. start: what the blocks begin with; None for
    new values.
    """
    initial = policy.initial(scenario.seed)
    if blocks and start is not None:
        initial = start.place(policy.layout, initial)
    limits = (episode_step_limit(shape, _episode_limit(shape, scenario)) for shape in shapes.values())
    return SharedBlocks(
        clients=tuple(name for settings in scenario.clients for name in settings.names),
        layout=policy.layout.subset(blocks),
        groups=_cut_groups(policy, blocks, scenario),
        initial=torch.cat([initial[:0], *(initial[block.start : block.stop] for block in blocks)]),
        max_episode_steps=max(limits, default=0),
        base=_common_base(shapes) if blocks else "",
        held_out=tuple(name for settings in scenario.clients if not settings.trains for name in settings.names),
    )


def _episode_limit(shape: TaskShape, scenario: Scenario) -> int:
    """Return the limit that a scenario sets to episodes; the one for completions is their task's own."""
    return 0 if shape.kind == "tokens" else scenario.rollout.episode_limit


def _common_base(shapes: Mapping[str, TaskShape]) -> str:
    """Return the digest of the clients' frozen model; ValueError where two clients have different ones."""
    first: tuple[str, str] | None = None
    for client, shape in shapes.items():
        if not shape.base:
            continue
        if first is None:
            first = client, shape.base
        elif first[1] != shape.base:
            raise ValueError(
                f"language.model: client {client} has another base (sha256 {shape.base[:12]}...) than client"
                f" {first[0]} ({first[1][:12]}...): adapters of different models cannot be merged; give all clients the"
                " same files"
            )
    return "" if first is None else first[1]


def _cut_groups(policy: Policy, blocks: Sequence[Block], scenario: Scenario) -> Groups:
    """Cut these blocks into the scenario's groups, as groups of the blocks' columns alone."""
    groups = cut_groups(policy.layout, scenario.policy.groups, only=blocks)
    chain_of = {block.name: policy.chain_of(block.slots[0].name) for block in blocks}
    chains = tuple(chain_of[block] for block in groups.blocks)
    return replace(groups, ids=groups.ids[policy.layout.mask(blocks)], chains=chains)


def _is_common(block: Block, policies: Sequence[_ClientPolicy], scenario: Scenario) -> bool:
    """Return whether every policy has this block in the same shapes.

    Raises a ValueError where it does not and the scenario shares the block by name.
    """
    shapes = [slot.shape for slot in block.slots]
    for other in policies[1:]:
        same_name = next((each for each in other.policy.layout.blocks if each.name == block.name), None)
        other_shapes = None if same_name is None else [slot.shape for slot in same_name.slots]
        if other_shapes == shapes:
            continue
        if ALL in scenario.policy.shared:
            return False
        has = "no such block" if other_shapes is None else f"shapes {short_toml(other_shapes)}"
        adapt = ""
        if other_shapes and scenario.policy.kind == "mlp":
            adapt = ", or set policy.adapter so that the layers behind different observations have one shape"
        raise ValueError(
            f"policy.shared matches block {block.name}, of shapes {short_toml(shapes)} for client {policies[0].client}"
            f" but {has} for client {other.client} ({other.task}): leave it out{adapt};"
            ' "*" shares all blocks that are alike'
        )
    return True
