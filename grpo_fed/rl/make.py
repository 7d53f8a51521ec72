"""The implementation of learning that fits some clients."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.learner import ClientPolicies
from grpo_fed.rl.stacked_policies import StackedPolicies
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym_task import GymTask


def make_client_policies(tasks: Sequence[GymTask], scenario: Scenario, shared_blocks: SharedBlocks) -> ClientPolicies:
    """What evaluates, measures and trains the policies of these clients.

    tasks: of clients whose policies have the same shape.
    """
    return StackedPolicies(tasks, scenario, shared_blocks)
