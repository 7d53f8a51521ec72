"""Makes the policy that fits a task: our network, or a user's own module."""

from __future__ import annotations

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.base import StackedPolicy
from grpo_fed.policy.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
from grpo_fed.policy.user_module import UserModulePolicy, import_module_class
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.task import ActionSpec, TaskShape


def make_policy(task: GymTask, settings: PolicySettings) -> StackedPolicy:
    """Make the policy for a task.

    Raises a ValueError that names the client where the settings do not fit the task.
    """
    distribution = make_distribution(task.action, settings.squash)
    try:
        if settings.module is None:
            return ActorCritic(task.observation_size, distribution, settings)
        spaces = task.observation_space, task.action_space
        return UserModulePolicy(
            import_module_class(settings.module), spaces, task.observation_size, distribution, settings
        )
    except ValueError as error:
        raise ValueError(f"client {task.client} ({task.env}): {error}") from error


def make_policy_from_shape(shape: TaskShape, settings: PolicySettings) -> StackedPolicy:
    """Make our network for a task that cannot be made here, only from the task's shape.

    A user's module is built from a task's spaces, so it cannot be made like this.
    """
    assert settings.module is None, "a user's module needs the task"
    distribution = make_distribution(ActionSpec(shape.kind, shape.sizes), settings.squash)
    return ActorCritic(shape.observation_size, distribution, settings)


def make_distribution(action: ActionSpec, squash: bool) -> Distribution:
    """Return the distribution of a task's actions. squash: whether Gaussian actions go through tanh."""
    if action.kind == "categorical":
        return Categorical(action.sizes[0])
    if action.kind == "multi-categorical":
        return MultiCategorical(action.sizes)
    return SquashedGaussian(action.size) if squash else Gaussian(action.size)
