"""The rows of the tables of keys that have no effect beside other values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a scenario once its environments and policies have been made."""

    box_actions: bool
    """Whether some client has a box of actions."""
    private_blocks: bool
    """Whether some client has a block that is not shared."""


@dataclass(frozen=True)
class Unused:
    """A row of the table: keys that have no effect, but for rounding, under a condition."""

    keys: tuple[str, ...]
    """The keys, such as `merge.threshold`; those of a client are `clients.entropy`."""
    condition: Callable[[Scenario], bool]
    """Whether the keys have no effect in a scenario."""
    reason: str
    """Why; `{0}` stands for the scenario."""
    task_condition: Callable[[TaskFacts], bool] | None = None
    """A further condition on the tasks, for what a scenario alone does not tell."""

    def holds(self, scenario: Scenario, tasks: TaskFacts | None) -> bool:
        """Whether the keys have no effect; False if that depends on the tasks and these are not known."""
        if self.task_condition is not None and (tasks is None or not self.task_condition(tasks)):
            return False
        return self.condition(scenario)
