"""What a server finds out about its clients' tasks before the first round, so that it knows which blocks they share.

The server makes the tasks that it has the packages for; clients report the shapes of the others. Shapes are enough to
find the shared blocks, except for a user's own network: that may depend on more of a task, so then the server has to
make all tasks.
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
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import resolve_available_tasks


def discover_shared_blocks(
    scenario: Scenario, registry: NodeRegistry, engine_state: Mapping[str, Any]
) -> tuple[SharedBlocks, dict[str, Any]]:
    """Find the shared blocks, and what the engine has to save, so that a run that goes on finds the same.

    Clients whose tasks cannot be made here are waited for, `round.deadline` seconds at most; clients that connect later
    have to share what was found without them.

    registry: reports the clients' task shapes. engine_state: what was saved when the run began; empty for a new run.
    ValueError if no task is known, or if blocks that the scenario shares differ between clients.
    """
    if TASK_SHAPES in engine_state:
        shapes = read_task_shapes(engine_state)
        return resolve_shared_blocks_from_shapes(scenario, shapes), {TASK_SHAPES: engine_state[TASK_SHAPES]}
    if scenario.policy.module is not None:
        return resolve_shared_blocks(scenario), {}
    # A language model is on the clients' machines: they say which, and the server needs no file of it.
    available = [task for task in resolve_available_tasks(scenario) if isinstance(task, GymTask)]
    shapes = {task.client: task.shape for task in available}
    unknown = {name for settings in scenario.clients for name in settings.names} - shapes.keys()
    if not unknown:
        return resolve_shared_blocks_from_shapes(scenario, shapes), {}

    def find_reported() -> tuple[str, ...]:
        registry.connected_clients()
        return tuple(unknown & registry.task_shapes.keys())

    wait_for_clients(find_reported, unknown, len(unknown), scenario.round.deadline)
    reported = {name: shape for name, shape in registry.task_shapes.items() if name in unknown and shape is not None}
    shapes |= reported
    if not shapes:
        raise ValueError(
            f"scenario {scenario.name}: no client's task can be made here, and no client reported its task within"
            f" round.deadline = {scenario.round.deadline:g} seconds"
        )
    state = {TASK_SHAPES: {name: asdict(shape) for name, shape in shapes.items()}}
    return resolve_shared_blocks_from_shapes(scenario, shapes), state
