"""Makes the policy that fits a task: our networks, a user's own module, or the adapters of a language model."""

from __future__ import annotations

from typing import overload

from grpo_fed.policy.actor_critic import ActorCritic
from grpo_fed.policy.base import Policy, StackedPolicy
from grpo_fed.policy.cnn import CnnPolicy
from grpo_fed.policy.distributions import (
    Categorical,
    Distribution,
    Gaussian,
    Hybrid,
    MultiCategorical,
    SquashedGaussian,
)
from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.base import read_base_facts
from grpo_fed.policy.language.shape import ModelShape
from grpo_fed.policy.recurrent import RecurrentPolicy
from grpo_fed.policy.user_module import UserModulePolicy, import_module_class
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.task import ActionSpec, MissingPackageError, Task, TaskShape


@overload
def make_policy(task: GymTask, settings: PolicySettings) -> StackedPolicy: ...


@overload
def make_policy(task: LanguageTask, settings: PolicySettings) -> AdapterPolicy: ...


@overload
def make_policy(task: Task, settings: PolicySettings) -> Policy: ...


def make_policy(task: Task, settings: PolicySettings) -> Policy:
    """Make the policy for a task.

    Raises a ValueError that names the client where the settings do not fit the task.
    """
    if isinstance(task, LanguageTask):
        shape, _ = _read_base(task)
        length = task.language.length
        if length >= shape.context:
            raise ValueError(
                f"client {task.client}: language.length: {length} leaves no room for a prompt in the {shape.context}"
                f" tokens that {task.language.model} reads; lower it"
            )
        try:
            return AdapterPolicy(shape, task.language, settings)
        except ValueError as error:
            raise ValueError(f"client {task.client}: {error}") from error
    assert isinstance(task, GymTask)
    distribution = make_distribution(task.action, settings.squash)
    try:
        if settings.module is None:
            return _make_network(task.shape, distribution, settings)
        spaces = task.observation_space, task.action_space
        return UserModulePolicy(
            import_module_class(settings.module), spaces, task.observation_size, distribution, settings
        )
    except ValueError as error:
        raise ValueError(f"client {task.client} ({task.env}): {error}") from error


def make_policy_from_shape(shape: TaskShape, scenario: Scenario) -> Policy:
    """Make a policy for a task that cannot be made here, only from the task's shape.

    A user's module is built from a task's spaces, so it cannot be made like this. Raises a ValueError where the
    scenario does not fit the shape.
    """
    if shape.kind == "tokens":
        return AdapterPolicy(ModelShape.from_sizes(shape.sizes), scenario.language, scenario.policy)
    assert scenario.policy.module is None, "a user's module needs the task"
    distribution = make_distribution(ActionSpec(shape.kind, shape.sizes), scenario.policy.squash)
    return _make_network(shape, distribution, scenario.policy)


def _make_network(shape: TaskShape, distribution: Distribution, settings: PolicySettings) -> StackedPolicy:
    """Make a network of ours; ValueError with a cure where the kind of policy does not fit the observations."""
    if settings.kind == "cnn":
        if not shape.picture:
            raise ValueError(
                'policy.kind = "cnn" is for pictures, boxes of uint8 with two or three axes, and observations here have'
                f' {shape.observation_size} numbers; use policy.kind = "mlp"'
            )
        return CnnPolicy(shape.picture, distribution, settings)
    if shape.picture:
        raise ValueError(
            f'observations are pictures, {" x ".join(map(str, shape.picture))} of uint8: set policy.kind = "cnn", or'
            ' make them flat by wrappers = ["gymnasium.wrappers:FlattenObservation"]'
        )
    if settings.memory != "none":
        return RecurrentPolicy(shape.observation_size, distribution, settings)
    return ActorCritic(shape.observation_size, distribution, settings)


def describe_shape(task: Task) -> TaskShape:
    """Return the facts that determine a task's policy; of a language model, they are read from the model's files."""
    if isinstance(task, LanguageTask):
        shape, digest = _read_base(task)
        return TaskShape(shape.context, "tokens", shape.to_sizes(), task.language.length, digest)
    assert isinstance(task, GymTask)
    return task.shape


def make_distribution(action: ActionSpec, squash: bool) -> Distribution:
    """Return the distribution of a task's actions. squash: whether Gaussian actions go through tanh."""
    if action.kind == "categorical":
        return Categorical(action.sizes[0])
    if action.kind == "multi-categorical":
        return MultiCategorical(action.sizes)
    point = SquashedGaussian(action.reals) if squash else Gaussian(action.reals)
    return Hybrid(MultiCategorical(action.choices), point) if action.choices else point


def _read_base(task: LanguageTask) -> tuple[ModelShape, str]:
    """Read the shape and the digest of a client's model; one that is missing here may be on the client's machine."""
    try:
        return read_base_facts(task.language.model)
    except ValueError as error:
        reason = str(error).removeprefix("language.model: ")
        raise MissingPackageError(f"client {task.client}: language.model: {reason}") from error
