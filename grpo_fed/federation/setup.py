"""A scenario's tasks and shared blocks, resolved once and handed on to all that need them.

A scenario names environments; what a client observes and does is known only after its environment has been made. So
resolving the tasks makes and closes an environment for each entry of `[[clients]]`, with `spread` one for each client,
and as many again for each of its `changes`, which takes seconds for some simulators. Server, clients and reports in one
process therefore share one record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, final

from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.unused_rows import TaskFacts
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import group_by_policy_shape, resolve_tasks
from grpo_fed.tasks.task import Task


@final
@dataclass(frozen=True, eq=False)
class FederationSetup:
    """What a scenario's clients learn, and what their policies share."""

    scenario: Scenario
    tasks: Mapping[str, Task]
    """Every client's task by the client's name, in the scenario's order."""
    tasks_by_policy: tuple[tuple[Task, ...], ...]
    """The same tasks, grouped by clients whose policies have the same shapes; a group can be trained as one stack."""
    shared_blocks: SharedBlocks

    @classmethod
    def of(cls, scenario: Scenario) -> Self:
        """Resolve a scenario.

        Raises ValueError for everything that is wrong with its environments, or if a block that it shares by name is
        not the same for all clients.
        """
        tasks = resolve_tasks(scenario)
        return cls(
            scenario=scenario,
            tasks={task.client: task for task in tasks},
            tasks_by_policy=tuple(tuple(group) for group in group_by_policy_shape(tasks, scenario.policy)),
            shared_blocks=resolve_shared_blocks(scenario, tasks),
        )

    @property
    def clients(self) -> tuple[str, ...]:
        """The names of all clients, in the scenario's order."""
        return self.shared_blocks.clients

    @property
    def task_facts(self) -> TaskFacts:
        """What decides whether some keys of the scenario have an effect."""
        shared = set(self.shared_blocks.blocks)
        layouts = [make_policy(tasks[0], self.scenario.policy).layout for tasks in self.tasks_by_policy]
        return TaskFacts(
            box_actions=any(isinstance(task, GymTask) and task.action.reals > 0 for task in self.tasks.values()),
            private_blocks=any(block.name not in shared for layout in layouts for block in layout.blocks),
        )
