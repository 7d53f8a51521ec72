"""ClientEnvs, the interface to env copies that are stepped together, and what all its kinds share.

There are L env copies: N copies of each of K clients' tasks. The copies of a client are consecutive, copy n of client k
has the index k * N + n. D is the size of an observation, A that of an action.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np

from grpo_fed.tasks.curriculum import EPISODE_SEED
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.task import TaskShape

NEVER = 2**62

Level: TypeAlias = Mapping[str, float]
"""Values of some of an environment's arguments, in place of the task's; and the seed of its episodes, if it has one
(tasks/curriculum.py)."""


@dataclass(frozen=True)
class EnvStep:
    """The results of one step of every env copy. A copy whose episode ends begins the next one in the same step."""

    observations: np.ndarray
    """[L, D] float32, or uint8 of pictures: what to act on next; where an episode ended, the first observation of the
    next one."""
    final_observations: np.ndarray
    """[L, D]: what the action led to; equal to `observations` where no episode ended."""
    rewards: np.ndarray
    """[L] float64."""
    terminated: np.ndarray
    """[L] bool: the task ended the episode; nothing comes after."""
    truncated: np.ndarray
    """[L] bool: the episode was cut; more would have come."""
    valid: np.ndarray
    """[L] bool: False where the action was not used (a reset step of an environment that resets itself late)."""
    costs: np.ndarray | None = None
    """[L] float64: what each action cost, 0 where it was not used; None where no cost is read."""


class ClientEnvs(ABC):
    """Copies of clients' tasks that are stepped together. After a TaskError, `reset` makes them usable again.

    Each env copy has a stream of episodes, which the seed given to `reset` names. Episode e of a stream is reset with
    `episode_seed(stream, e)`, so an episode can be repeated from its stream and number, and no copy depends on another.
    The copies of a task with levels begin with levels that are spread evenly over all of its ranges.
    """

    names: tuple[str, ...]
    """[L]: the client of each env copy."""
    observation_size: int
    """D."""
    observation_dtype: np.dtype[Any]
    """The type of observations: uint8 for pictures, float32 for others."""
    cost_key: str | None
    """The key of a step's info that has its cost; None where no cost is read."""
    reproducible: bool
    """Whether episodes have these seeds; an environment that resets itself begins its episodes without them."""

    @property
    def size(self) -> int:
        """L: the number of env copies."""
        return len(self.names)

    @abstractmethod
    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Begin the first episode of the streams that seeds [L] uint64 name; first observations [L, D]."""

    @abstractmethod
    def set_levels(self, levels: Mapping[int, Level]) -> None:
        """Set the level of all episodes that these env copies begin from now on; a running episode keeps its own."""

    @abstractmethod
    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        """Continue interrupted episodes: reset each env copy to its episode, and take the actions so far once more.

        seeds: [L] uint64, the streams. episodes: [L], the number of each copy's episode in its stream. actions: [L] of
        [n, A], the n actions that a copy took in its episode.

        Returns the observations [L, D] to act on next. Copies that are not reproducible begin a new episode.
        """

    @abstractmethod
    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        """Take the policy's actions, [L, A] floats. The arrays of the result are new ones.

        restart: whether an env copy whose episode ends begins the next one. Without it the copy sleeps until the next
        `reset`: its steps are not valid, their reward is 0, and its observation is its last one.
        """

    @abstractmethod
    def reset_infos(self, key: str) -> np.ndarray:
        """Return the values [L] that the info of each copy's latest reset has under `key`; ValueError without one."""

    @abstractmethod
    def close(self) -> None:
        """Close the environments."""


def episode_seed(stream: int, episode: int) -> int:
    """Compute the seed, from 0 to 2**31 - 1, of the `episode`-th episode of a stream.

    SplitMix64 (Steele, Lea and Flood 2014): the stream is its seed and the episode the number of steps.
    """
    mixed = (stream + (episode + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) >> 33


def episode_step_limit(task: GymTask | TaskShape, episode_limit: int) -> int:
    """Return the steps after which an episode is cut: the smaller of the task's limit and this one; 0 for never."""
    return min(task.episode_limit or NEVER, episode_limit or NEVER) % NEVER


def take_seeds(levels: Mapping[int, Level]) -> dict[int, int]:
    """Find the seeds of the episodes of env copies whose levels have one."""
    return {copy: int(level[EPISODE_SEED]) for copy, level in levels.items() if EPISODE_SEED in level}


def without_seed(level: Level) -> dict[str, float]:
    """Return the arguments of a level alone."""
    return {name: value for name, value in level.items() if name != EPISODE_SEED}


@final
class StepLimits:
    """Tracks when the episodes of env copies have to be cut. One clock for all, so a step costs a comparison."""

    def __init__(self, limits: Sequence[int]) -> None:
        """limits: [L], steps of an episode, 0 for no limit."""
        self.limits = np.array([limit or NEVER for limit in limits])
        self.clock = 0
        self.due = np.full(len(limits), NEVER)
        self.next_due = NEVER

    def start(self, copies: Any, steps_done: Any = 0) -> None:
        """Begin an episode in these copies, or continue one of which `steps_done` steps are done."""
        self.due[copies] = self.limits[copies] + self.clock - steps_done
        self.next_due = self.due.min()

    def stop(self, copies: Any) -> None:
        """Cut no episode of these copies until `start`."""
        self.due[copies] = NEVER
        self.next_due = self.due.min()

    def tick(self) -> list[int]:
        """Count a step of all copies, and return those for which it was the last one allowed."""
        self.clock += 1
        return [] if self.clock < self.next_due else np.flatnonzero(self.due <= self.clock).tolist()


def pad_actions(actions: Sequence[np.ndarray], ends_together: bool) -> np.ndarray:
    """Stack the actions of env copies, [L] of [n, A] -> [T, L, A], where T is the largest n.

    ends_together: whether zeros are put before the shorter ones, and not behind them.
    """
    longest, width = max(len(taken) for taken in actions), actions[0].shape[1]
    padded = np.zeros((longest, len(actions), width), np.float32)
    for copy, taken in enumerate(actions):
        start = longest - len(taken) if ends_together else 0
        padded[start : start + len(taken), copy] = taken
    return padded


def reset_info_values(key: str, infos: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Return the values [L] under `key` in the infos of env copies' resets.

    ValueError if an info has no such key, or a value is neither a number nor a text. names: [L], the clients.
    """
    for name, info in zip(names, infos, strict=True):
        if key not in info:
            keys = f"it has {', '.join(map(str, info))}" if info else "it is empty"
            raise ValueError(f"group.key = {key!r}: client {name}: the info of its resets has no such key; {keys}")
    values = np.array([info[key] for info in infos])
    if values.ndim != 1 or values.dtype == object:
        kind = type(infos[0][key]).__name__
        raise ValueError(f"group.key = {key!r}: client {names[0]}: it must be a number or a text; here it is a {kind}")
    return values


def read_cost(info: Mapping[str, Any], key: str) -> float:
    """Read a step's cost from its info; ValueError with a cure if it has none, or if it is not a number."""
    if key not in info:
        raise missing_cost_error(key, info)
    value = info[key]
    if np.ndim(value) or not isinstance(value, float | int | np.number | np.ndarray | np.bool_):
        raise ValueError(f"objective.cost.key = {key!r}: a cost must be a number; here it is a {type(value).__name__}")
    return float(value)


def missing_cost_error(key: str, found: Iterable[Any]) -> ValueError:
    """Return the error for a step without a cost. found: the keys that its info has."""
    keys = ", ".join(map(str, found))
    return ValueError(
        f"objective.cost.key = {key!r}: the info of a step has no such key, it {f'has {keys}' if keys else 'is empty'};"
        " set the key of the cost, or put a wrapper around the environment that adds it to every info"
    )


def check_finite(
    observations: np.ndarray, rewards: np.ndarray, names: Sequence[str], first: int = 0, reward: str = "reward"
) -> None:
    """Raise ValueError for a NaN or infinity in observations [K, T, N, D] or rewards [K, T, N].

    names: [K], the clients. first: the number of the first step, for the message. reward: what it calls a reward.
    """
    for what, values in (("observation", observations), (reward, rewards)):
        if values.dtype.kind == "u":
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):  # far cheaper than looking at each
                continue
        places = np.argwhere(~np.isfinite(values))
        if len(places) == 0:  # the sum alone was too large
            continue
        client, step, copy, *entry = places[places[:, 1].argmin()].tolist()
        which = f"entry {entry[0]} of the {what}" if entry else f"the {what}"
        raise non_finite_error(names[client], copy, first + step, which, values[client, step, copy, *entry])


def non_finite_error(client: str, copy: int, step: int, what: str, value: float) -> ValueError:
    """Return the error for a NaN or infinity in a batch. what: the phrase that names the number, as "the reward"."""
    return ValueError(
        f"client {client}: in env copy {copy}, at step {step} of this batch, {what} is {value}; correct the"
        " environment, or put a wrapper around it that does"
    )
