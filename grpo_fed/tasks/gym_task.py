"""GymTask: a task that is a gymnasium environment, and EnvConfig, what it takes to make that environment.

A client's task may have levels (curriculum.py), and it may change during a run: `GymTask.at(round)` is the task of a
round. Whatever makes environments asks for it, and nothing else has to know about changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias, final

import gymnasium
import numpy as np
from gymnasium import vector

from grpo_fed.tasks.curriculum import Curriculum
from grpo_fed.tasks.pictures import PictureShape, picture_shape
from grpo_fed.tasks.task import ActionSpec, Task, TaskShape

Env: TypeAlias = gymnasium.Env[Any, Any]
VectorEnv: TypeAlias = vector.VectorEnv[Any, Any, Any]
Space: TypeAlias = gymnasium.Space[Any]


@dataclass(frozen=True)
class EnvWrapper:
    """A wrapper that is put around an environment."""

    path: str
    """Its import path."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that it is called with, behind the environment."""

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.kwargs.items())
        return f"{self.path}({arguments})" if arguments else self.path


@dataclass(frozen=True)
class EnvConfig:
    """What it takes to make a client's environment."""

    client: str
    """The client's name."""
    env: str
    """A gymnasium id, `module:EnvId`, or `module:function`."""
    kwargs: Mapping[str, Any]
    """Arguments of the environment."""
    wrappers: tuple[EnvWrapper, ...]
    """The wrappers, innermost first."""
    episode_limit: int
    """Steps after which the task itself truncates an episode; 0 for never."""


@final
@dataclass(frozen=True)
class GymTask(Task, EnvConfig):
    """One client's environment: how to make it, its spaces, and how the client learns in it."""

    observation_size: int
    """D: entries of a flattened observation."""
    action: ActionSpec
    observation_space: Space
    action_space: Space
    since: int = 0
    """The round from which the client has this task; 0 for the task that it begins with."""
    curriculum: Curriculum | None = None
    """The levels that the task has, and how those of training are chosen; None if all episodes have the same kwargs."""
    changes: tuple[GymTask, ...] = ()
    """The client's later tasks in the order of their rounds; they have the same signature, and no changes."""

    def at(self, round: int) -> Self:
        """Return the client's task in a round: the last one that has begun."""
        return next((task for task in reversed(self.changes) if task.since <= round), self)

    @property
    def picture(self) -> PictureShape:
        """The shape of an observation that is a picture; () for others."""
        return picture_shape(self.observation_space)

    @property
    def observation_dtype(self) -> np.dtype[Any]:
        """The type of a flattened observation: uint8 for a picture, float32 for others."""
        return np.dtype(np.uint8 if self.picture else np.float32)

    @property
    def shape(self) -> TaskShape:
        """The facts that determine the task's policy, with the largest step limit of the task and its changes."""
        limits = [task.episode_limit for task in (self, *self.changes)]
        limit = 0 if 0 in limits else max(limits)
        return TaskShape(self.observation_size, self.action.kind, self.action.sizes, limit, picture=self.picture)

    @property
    def signature(self) -> Hashable:
        return self.shape.signature

    @property
    def description(self) -> str:
        return self.env
