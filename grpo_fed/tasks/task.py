"""A task: which environment a client has, what it sees and does there, and how the client learns in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import gymnasium
from gymnasium.vector import VectorEnv

Env: TypeAlias = gymnasium.Env[Any, Any]
Vector: TypeAlias = VectorEnv[Any, Any, Any]
Space: TypeAlias = gymnasium.Space[Any]

NO_STEP_LIMIT = 2**31 - 1
"""Steps of an episode that nothing cuts, for what wants a number."""


ActionKind: TypeAlias = Literal["categorical", "multi-categorical", "gaussian"]
ACTION_KINDS: tuple[ActionKind, ...] = get_args(ActionKind)


class MissingPackageError(ValueError):
    """A task cannot be made, because a library that it needs is not on this machine; it may be on the client's."""


@dataclass(frozen=True)
class TaskShape:
    """What whoever cannot make a task must know of it to know its policy."""

    observation_size: int
    """D: entries of a flattened observation."""
    kind: ActionKind
    """Of its actions."""
    sizes: tuple[int, ...]
    """Of its actions."""
    episode_limit: int
    """Steps after which the task itself truncates an episode; 0 for never."""


@dataclass(frozen=True)
class ActionSpec:
    """What an action of a task is, whatever the shape that its environment wants it in."""

    kind: ActionKind
    """One choice, several choices, or real numbers."""
    sizes: tuple[int, ...]
    """How many there are to choose from, for each choice; or (A,) for A real numbers."""
    start: tuple[int, ...] = ()
    """The number of the first thing to choose, for each choice."""
    low: tuple[float, ...] = ()
    """The least of each real number; -inf where there is none."""
    high: tuple[float, ...] = ()
    """The greatest of each real number; inf where there is none."""

    @property
    def size(self) -> int:
        """A: entries of an action."""
        return self.sizes[0] if self.kind == "gaussian" else len(self.sizes)


@dataclass(frozen=True)
class EnvConfig:
    """What it takes to make a client's environment."""

    client: str
    """The client's name."""
    env: str
    """A gymnasium id, or `module:EnvId`."""
    kwargs: Mapping[str, Any]
    """Arguments for the environment."""
    wrappers: tuple[str, ...]
    """Import paths, innermost first."""
    episode_limit: int
    """Steps after which the task itself truncates an episode; 0 for never."""


@dataclass(frozen=True)
class Task(EnvConfig):
    """One client's environment with what it is like, and how the client learns there."""

    observation_size: int
    """D: entries of a flattened observation."""
    action: ActionSpec
    observation_space: Space
    action_space: Space
    learning_rate: float
    entropy: float
    """Weight of the entropy bonus."""
    penalty: float
    """Weight of the group penalty."""

    @property
    def signature(self) -> tuple[object, ...]:
        """Tasks with equal ones can be learned by equally shaped policies."""
        return self.observation_size, self.action.kind, self.action.sizes

    @property
    def shape(self) -> TaskShape:
        """What others must know of it."""
        return TaskShape(self.observation_size, self.action.kind, self.action.sizes, self.episode_limit)


class TaskError(RuntimeError):
    """A client's environment failed while it was played."""

    def __init__(self, client: str, env: str, what: str) -> None:
        super().__init__(client, env, what)  # all three, so that it survives the way out of another process
        self.client = client
        self.env = env
        self.what = what

    def __str__(self) -> str:
        return f"client {self.client}: {self.env}: {self.what}"
