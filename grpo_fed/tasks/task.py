"""Task, the record of what a client learns to do, and its parts. Nothing here knows gymnasium.

Each client has one task. `Task` holds what every kind of task has, whatever the client's observations and actions are;
`GymTask` (gym_task.py) is a task that is a gymnasium environment, `LanguageTask` (language_task.py) one of prompts with
rewards. If the actions of another kind of task are new, `ActionKind` grows by one, and with it `TaskShape`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias, get_args

NO_STEP_LIMIT = 2**31 - 1
"""The step limit of an episode that is never truncated, for interfaces that require a number."""

ActionKind: TypeAlias = Literal["categorical", "multi-categorical", "gaussian", "hybrid", "tokens"]
ACTION_KINDS: tuple[ActionKind, ...] = get_args(ActionKind)


@dataclass(frozen=True)
class Task(ABC):
    """What one client learns to do, and the settings that it alone learns with."""

    client: str
    """The client's name."""
    learning_rate: float
    entropy: float
    """Weight of the entropy bonus."""
    penalty: float
    """Weight of the group penalty."""
    reward_scale: float
    """What rewards are multiplied by before the client learns from them."""

    @property
    @abstractmethod
    def signature(self) -> Hashable:
        """Equal for tasks that policies with the same parameter shapes can learn."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What error messages call the task, such as the id of its environment."""

    def at(self, round: int) -> Self:
        """Return the client's task in a round; the same in all rounds unless the kind of task has changes."""
        return self


@dataclass(frozen=True)
class TaskShape:
    """The facts about a task that determine its policy, for a machine that cannot make the task itself."""

    observation_size: int
    """D: entries of a flattened observation; of a language model, the tokens that it can read."""
    kind: ActionKind
    """Kind of the task's actions."""
    sizes: tuple[int, ...]
    """Sizes of the action's components, as in `ActionSpec.sizes`; of a language model, `ModelShape.to_sizes`."""
    episode_limit: int
    """Steps after which the task itself truncates an episode; 0 for never."""
    base: str = ""
    """The digest of a language model's frozen base; all clients must have the same."""
    picture: tuple[int, ...] = ()
    """The shape of an observation that is a picture; () for others."""

    @property
    def signature(self) -> Hashable:
        """Equal for tasks that policies with the same parameter shapes can learn, as `Task.signature`."""
        return self.observation_size, self.kind, self.sizes, *self.picture


@dataclass(frozen=True)
class ActionSpec:
    """What an action consists of, independent of the shape and type in which an environment takes it."""

    kind: ActionKind
    """One choice, several choices, real numbers, or choices and real numbers."""
    sizes: tuple[int, ...]
    """Number of options of each choice, and behind them how many real numbers there are: (A,) for these alone."""
    start: tuple[int, ...] = ()
    """Number of the first option of each choice."""
    low: tuple[float, ...] = ()
    """Lower bound of each real number; -inf where there is none."""
    high: tuple[float, ...] = ()
    """Upper bound of each real number; inf where there is none."""

    @property
    def choices(self) -> tuple[int, ...]:
        """Number of options of each choice."""
        return self.sizes[:-1] if self.kind in ("gaussian", "hybrid") else self.sizes

    @property
    def reals(self) -> int:
        """How many real numbers there are."""
        return self.sizes[-1] if self.kind in ("gaussian", "hybrid") else 0

    @property
    def size(self) -> int:
        """A: entries of an action, the choices first."""
        return len(self.choices) + self.reals


class MissingPackageError(ValueError):
    """Raised for a task that needs a package or a file which is not here, but may be on the client's machine."""


class TaskError(RuntimeError):
    """Raised when a client's environment fails in a reset or a step, or its prompts or rewards in a draw or a call.

    env: the environment, or the key and value of the scenario that failed, such as `rewards: exact`.
    """

    def __init__(self, client: str, env: str, problem: str) -> None:
        super().__init__(client, env, problem)  # all three, so that it can be pickled and sent between processes
        self.client = client
        self.env = env
        self.problem = problem

    def __str__(self) -> str:
        return f"client {self.client}: {self.env}: {self.problem}"
