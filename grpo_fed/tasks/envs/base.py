"""What lanes are, how their episodes are named, and when these are cut.

L lanes are N copies of each of K clients' tasks, a client's own next to each other: lane = client * N + copy. D
observation entries, A action entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from grpo_fed.tasks.task import Task, TaskShape

NEVER = 2**62


class ClientEnvs(ABC):
    """Copies of tasks that are stepped together. After a TaskError, `reset` starts them anew.

    Episode e of a lane is reset with `episode_seed(stream, e)`, where `stream` is what the lane was told to begin with:
    so an episode can be played again from its name, and no lane depends on another.
    """

    names: tuple[str, ...]
    """[L]: whose copy each lane is."""
    observation_size: int
    """D."""
    reproducible: bool
    """Whether that holds for every episode; an environment that resets itself decides on its own."""

    @property
    def size(self) -> int:
        """L."""
        return len(self.names)

    @abstractmethod
    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Begin the streams of episodes that seeds [L] uint64 name; first observations [L, D] float32."""

    @abstractmethod
    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        """Take up the `episodes`-th [L] of the streams where they were left: lanes take their actions so far once more.

        `actions` [L] of [n, A] each, n as long as the lane's episode was. Observations [L, D] that the lanes stand at.
        Lanes that are not reproducible begin anew.
        """

    @abstractmethod
    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        """Take the policy's actions, [L, A] floats. All arrays of the Step are new ones.

        A lane that is done begins its next episode; or, without `restart`, it sleeps until the next `reset`: not valid,
        reward 0, its last observation as it was.
        """

    @abstractmethod
    def reset_infos(self, key: str) -> np.ndarray:
        """[L]: what each lane's latest reset said under `key` of its info; ValueError if it said nothing."""

    @abstractmethod
    def close(self) -> None:
        """Close the environments."""


def episode_seed(stream: int, episode: int) -> int:
    """Which seed the `episode`-th episode of a stream is reset with, from 0 to 2**31 - 1.

    SplitMix64 (Steele, Lea and Flood 2014), the stream being its seed and the episode how often it was stepped.
    """
    mixed = (stream + (episode + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) >> 33


def check_finite(observations: np.ndarray, rewards: np.ndarray, names: Sequence[str], first: int = 0) -> None:
    """ValueError for a NaN or infinity in observations [K, T, N, D] or rewards [K, T, N]; names [K] of the clients.

    `first` is the number of the first step.
    """
    for what, values in (("observation", observations), ("reward", rewards)):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(values.sum()):  # far cheaper than looking at each
                continue
        places = np.argwhere(~np.isfinite(values))
        if len(places) == 0:  # the sum alone was too large
            continue
        client, step, copy, *entry = places[places[:, 1].argmin()].tolist()
        which = f"entry {entry[0]} of the {what}" if entry else f"the {what}"
        raise non_finite_error(names[client], copy, first + step, which, values[client, step, copy, *entry])


def non_finite_error(client: str, lane: int, step: int, what: str, value: float) -> ValueError:
    """What to say of a NaN or infinity in a batch."""
    return ValueError(
        f"client {client}: in lane {lane}, at step {step} of this batch, {what} is {value}; mend the environment, or"
        " put a wrapper around it that does"
    )


@final
class StepLimits:
    """When the episodes of lanes are to be cut: one clock for all, which costs nothing while no one is due."""

    def __init__(self, limits: Sequence[int]) -> None:
        """`limits` [L]: steps of an episode, 0 for no limit."""
        self.limits = np.array([limit or NEVER for limit in limits])
        self.clock = 0
        self.due = np.full(len(limits), NEVER)
        self.next = NEVER

    def start(self, lanes: Any, made: Any = 0) -> None:
        """An episode begins in these lanes, or has `made` some steps already."""
        self.due[lanes] = self.limits[lanes] + self.clock - made
        self.next = self.due.min()

    def stop(self, lanes: Any) -> None:
        """Nothing goes on in these lanes."""
        self.due[lanes] = NEVER
        self.next = self.due.min()

    def tick(self) -> list[int]:
        """A step was made; the lanes in which it was the last one allowed."""
        self.clock += 1
        return [] if self.clock < self.next else np.flatnonzero(self.due <= self.clock).tolist()


def pad_actions(actions: Sequence[np.ndarray], ends_together: bool) -> np.ndarray:
    """Actions of lanes [L] of [n, A] as [T, L, A], with zeros behind them or, if they end together, before them."""
    longest, width = max(len(each) for each in actions), actions[0].shape[1]
    every = np.zeros((longest, len(actions), width), np.float32)
    for lane, each in enumerate(actions):
        begins = longest - len(each) if ends_together else 0
        every[begins : begins + len(each), lane] = each
    return every


def episode_step_limit(task: Task | TaskShape, episode_limit: int) -> int:
    """Steps after which lanes cut an episode: the task's own limit or this one, whichever comes first; 0 for never."""
    return min(task.episode_limit or NEVER, episode_limit or NEVER) % NEVER


def reset_info_values(key: str, infos: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """[L]: what stands under `key` in the infos of some lanes' resets."""
    for name, info in zip(names, infos, strict=True):
        if key not in info:
            known = f"it has {', '.join(map(str, info))}" if info else "it is empty"
            raise ValueError(f"group.key = {key!r}: client {name}: the info of its resets has no such key; {known}")
    values = np.array([info[key] for info in infos])
    if values.ndim != 1 or values.dtype == object:
        kind = type(infos[0][key]).__name__
        raise ValueError(f"group.key = {key!r}: client {names[0]}: it must be a number or a text; here it is a {kind}")
    return values


@dataclass(frozen=True)
class EnvStep:
    """What one step of every lane (a copy of a task) gave. A lane that is done starts anew in the same step."""

    observations: np.ndarray
    """[L, D] float32: what to act on next; where done, the first observation of the next episode."""
    final_observations: np.ndarray
    """[L, D] float32: what the action led to; equal to `observations` where not done."""
    rewards: np.ndarray
    """[L] float64."""
    terminated: np.ndarray
    """[L] bool: the task ended the episode; nothing comes after."""
    truncated: np.ndarray
    """[L] bool: the episode was cut; more would have come."""
    valid: np.ndarray
    """[L] bool: False where the action was not used (a reset step of an environment that resets itself late)."""
