"""What a server knows of its clients' tasks before the first round: what it can make itself, and what they tell.

So it needs the packages of no task: `Form`s decide what the clients share. Those of a network of the user's own do not,
since that may look at more of a task; then all tasks are made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.federation.participation import wait_for_clients
from grpo_fed.policy.shared import (
    TASK_SHAPES,
    SharedBlocks,
    read_task_shapes,
    resolve_shared_blocks,
    resolve_shared_blocks_from_shapes,
)
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_available_tasks


def discover_shared_blocks(
    scenario: Scenario, roll: NodeRegistry, noted: Mapping[str, Any]
) -> tuple[SharedBlocks, dict[str, Any]]:
    """What the clients have in common, and what the engine is to note of it, for who goes on from there.

    Those whose tasks cannot be made here are waited for, `round.deadline` seconds at most; who comes later finds the
    commons as they are. ValueError if nobody is known, or the blocks that the scenario shares are not alike.
    """
    if TASK_SHAPES in noted:
        return resolve_shared_blocks_from_shapes(scenario, read_task_shapes(noted)), {TASK_SHAPES: noted[TASK_SHAPES]}
    if scenario.policy.module is not None:
        return resolve_shared_blocks(scenario), {}
    known = {task.client: task.shape for task in resolve_available_tasks(scenario)}
    strangers = {name for settings in scenario.clients for name in settings.names} - known.keys()
    if not strangers:
        return resolve_shared_blocks_from_shapes(scenario, known), {}

    def heard() -> tuple[str, ...]:
        roll.connected_clients()
        return tuple(strangers & roll.task_shapes.keys())

    wait_for_clients(heard, strangers, len(strangers), scenario.round.deadline)
    known |= {name: form for name, form in roll.task_shapes.items() if name in strangers and form is not None}
    if not known:
        raise ValueError(
            f"scenario {scenario.name}: no client's task can be made here, and no client told of its own within"
            f" round.deadline = {scenario.round.deadline:g} seconds"
        )
    return resolve_shared_blocks_from_shapes(scenario, known), {
        TASK_SHAPES: {name: asdict(form) for name, form in known.items()}
    }
