"""What a scenario comes to before anything is trained: its clients, and how their policies are cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_fed.policy.blocks import Block
from grpo_fed.policy.groups import cut_groups
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.reports.tables import many, table_of
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import short_toml, shorten
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.task import ActionSpec

FLOAT = 4
"""Bytes."""


def scenario_overview(
    scenario: Scenario, fleets: Sequence[StackedLearner], commons: SharedBlocks
) -> Iterator[RenderableType]:
    """The whole, the clients, and the blocks of each shape of policy."""
    clients = sum(len(fleet.tasks) for fleet in fleets)
    steps = scenario.rounds * scenario.steps * clients
    name = Text.assemble((scenario.name, "bold cyan"), f": {scenario.description}" if scenario.description else "")
    yield name
    yield Text(
        f"{many(clients, 'client')}, {many(scenario.rounds, 'round')} of {scenario.steps:,} steps each:"
        f" {steps:,} steps; {scenario.objective.preset} on {fleets[0].device}, seed {scenario.seed}"
    )
    yield _clients_table(fleets)
    for fleet in fleets:
        yield Text.assemble("Policy of ", (shorten(", ".join(fleet.names), 70), "bold"), f": {_sizes(fleet, commons)}")
        yield _blocks_table(fleet, scenario, commons)
    yield Text(_messages(scenario, commons, clients))


def _messages(scenario: Scenario, commons: SharedBlocks, clients: int) -> str:
    """What a round sends: all shared parameters to each client that is drawn, and at most as much back."""
    if not commons.size:
        return "Nothing is shared: no parameters are sent."
    drawn = max(1, round(scenario.round.fraction * clients))
    groups = many(len(commons.groups.names), "group")
    return (
        f"Shared by all: {', '.join(commons.blocks)}, in {groups}. To train, {_bytes(commons.size)} go to a client and"
        f" at most {_bytes(commons.size)} come back; with {many(drawn, 'client')} drawn"
        f" {_bytes(2 * drawn * commons.size)} a round, without what measuring the step takes."
    )


def _clients_table(fleets: Sequence[StackedLearner]) -> Table:
    """A row for each client, or for all of an entry that have the same arguments."""
    table = table_of("client", "observation", "actions", "copies", "limit")
    table.add_column("env", overflow="fold")
    for fleet in fleets:
        copies = fleet.scenario.rollout.num_envs
        for (env, kwargs, limit), alike in groupby(fleet.tasks, key=_what):
            names = [task.client for task in alike]
            task = fleet.tasks[fleet.names.index(names[0])]
            limits = [steps for steps in (limit, fleet.scenario.rollout.episode_limit) if steps]
            table.add_row(
                names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})",
                str(task.observation_size),
                _action(task.action),
                str(copies),
                f"{min(limits):,}" if limits else "no end",
                f"{env} {kwargs}",
            )
    return table


def _what(task: GymTask) -> tuple[str, str, int]:
    """What tells the rows of the clients' table apart."""
    around = "".join(f" in {path}" for path in task.wrappers)
    arguments = ", ".join(f"{key} = {short_toml(value)}" for key, value in task.kwargs.items())
    return task.env, arguments + around, task.episode_limit


def _action(action: ActionSpec) -> str:
    if action.kind == "categorical":
        return f"1 of {action.sizes[0]}"
    if action.kind == "multi-categorical":
        counts = Counter(action.sizes)
        return " and ".join(f"{times} x 1 of {size}" for size, times in counts.items())
    return f"{action.size} real"


def _sizes(fleet: StackedLearner, commons: SharedBlocks) -> str:
    layout, shared = fleet.policy.layout, commons.size
    return (
        f"{layout.size:,} parameters, {_bytes(layout.size)}; shared {shared:,}, {_bytes(shared)};"
        f" {type(fleet.policy.distribution).__name__}"
    )


def _blocks_table(fleet: StackedLearner, scenario: Scenario, commons: SharedBlocks) -> Table:
    layout = fleet.policy.layout
    groups = Counter(cut_groups(layout, scenario.policy.groups).blocks)
    penalised = {block.name for block in layout.select(scenario.penalty.blocks)}
    budgets = {
        block.name: limit for pattern, limit in scenario.trust.blocks.items() for block in layout.select([pattern])
    }
    weighted = any(task.penalty for task in fleet.tasks) or scenario.penalty.l1 or scenario.penalty.outer
    table = table_of("block", "parameters", "bytes", "groups")
    table.add_column("kept", no_wrap=True)
    table.add_column("tensors", overflow="fold")
    for block in layout.blocks:
        shared = block.name in commons.blocks
        kept = ["shared" if shared else "private"]
        kept += ["penalised"] if weighted and block.name in penalised else []
        kept += [f"KL <= {budgets[block.name]:g}"] if block.name in budgets else []
        table.add_row(
            block.name,
            f"{block.size:,}",
            _bytes(block.size),
            f"{groups[block.name]:,}",
            Text(", ".join(kept), style="green" if shared else ""),
            _tensors(block),
        )
    return table


def _tensors(block: Block) -> str:
    """Their names, without the block's own before it, and shapes."""
    return ", ".join(f"{slot.name.removeprefix(block.name + '.')} {_shape(slot.shape)}" for slot in block.slots)


def _shape(shape: tuple[Any, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _bytes(parameters: int) -> str:
    size = parameters * FLOAT
    return f"{size:,} B" if size < 1_000 else f"{size / 1_000:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
