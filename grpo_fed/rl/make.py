"""The implementation of learning that fits some clients."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.rl.language.policies import LanguagePolicies
from grpo_fed.rl.learner import ClientPolicies, Learner
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.rl.stacked_policies import StackedPolicies
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.resolve import group_by_policy_shape, resolve_tasks
from grpo_fed.tasks.task import Task


def make_client_policies(tasks: Sequence[Task], scenario: Scenario, shared_blocks: SharedBlocks) -> ClientPolicies:
    """What evaluates, measures and trains the policies of these clients.

    tasks: of clients whose policies have the same shape.
    """
    texts = [task for task in tasks if isinstance(task, LanguageTask)]
    if texts:
        return LanguagePolicies(texts, scenario, shared_blocks)
    return StackedPolicies([task for task in tasks if isinstance(task, GymTask)], scenario, shared_blocks)


def make_learner(tasks: Sequence[Task], scenario: Scenario) -> Learner:
    """A learner of these clients, at the beginning of a run without a federation."""
    texts = [task for task in tasks if isinstance(task, LanguageTask)]
    if texts:
        make_policy(texts[0], scenario.policy)  # of what is wrong with the model, its errors name the client
        return LanguageLearner(texts, scenario)
    return StackedLearner([task for task in tasks if isinstance(task, GymTask)], scenario)


def make_learners(scenario: Scenario) -> list[Learner]:
    """Learners of all clients of a scenario in their first tasks, those with equally shaped policies together."""
    return [make_learner(tasks, scenario) for tasks in group_by_policy_shape(resolve_tasks(scenario), scenario.policy)]
