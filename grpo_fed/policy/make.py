"""Makes the policy that fits a task."""

from __future__ import annotations

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.base import Policy
from grpo_fed.policy.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
from grpo_fed.policy.user_module import UserModulePolicy, import_module_class
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.task import ActionSpec, TaskShape


def make_policy(task: GymTask, settings: PolicySettings) -> Policy:
    """The policy that fits a task: ours, or the user's module."""
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


def make_policy_from_shape(form: TaskShape, settings: PolicySettings) -> Policy:
    """Our own for a task that cannot be made here; a user's module may look at more of a task than its form."""
    assert settings.module is None, "the task is there to look at"
    return ActorCritic(
        form.observation_size, make_distribution(ActionSpec(form.kind, form.sizes), settings.squash), settings
    )


def make_distribution(action: ActionSpec, squash: bool) -> Distribution:
    """What a policy draws a task's actions from."""
    if action.kind == "categorical":
        return Categorical(action.sizes[0])
    if action.kind == "multi-categorical":
        return MultiCategorical(action.sizes)
    return SquashedGaussian(action.size) if squash else Gaussian(action.size)
