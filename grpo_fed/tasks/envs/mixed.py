"""Clients whose environments are stepped in different ways, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, final

import numpy as np

from grpo_fed.tasks.envs.base import ClientEnvs, EnvStep

EnvIndices: TypeAlias = slice | np.ndarray


def join_indices(clients: Sequence[int], copies: int) -> EnvIndices:
    """Which lanes the copies of these clients are; a slice where one does."""
    if clients[-1] - clients[0] == len(clients) - 1:
        return slice(clients[0] * copies, (clients[-1] + 1) * copies)
    return (np.array(clients)[:, None] * copies + np.arange(copies)).ravel()


@final
class MixedEnvs(ClientEnvs):
    """Lanes of several kinds, each of which is some of these."""

    def __init__(self, parts: Sequence[tuple[ClientEnvs, EnvIndices]]) -> None:
        """Each part with the lanes that it is; together they are all."""
        self.parts = parts
        self.observation_size = parts[0][0].observation_size
        self.reproducible = all(lanes.reproducible for lanes, _ in parts)
        names = np.empty(sum(lanes.size for lanes, _ in parts), object)
        for lanes, index in parts:
            names[index] = lanes.names
        self.names = tuple(names)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        observations = np.empty((self.size, self.observation_size), np.float32)
        for lanes, index in self.parts:
            observations[index] = lanes.reset(seeds[index])
        return observations

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        observations = np.empty((self.size, self.observation_size), np.float32)
        every = np.arange(self.size)
        for lanes, index in self.parts:
            mine = [actions[lane] for lane in every[index].tolist()]
            observations[index] = lanes.resume(seeds[index], episodes[index], mine)
        return observations

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        shape = (self.size, self.observation_size)
        joint = EnvStep(
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty(self.size),
            *(np.empty(self.size, bool) for _ in range(3)),
        )
        for lanes, index in self.parts:
            step = lanes.step(actions[index], restart)
            for name, values in vars(step).items():
                getattr(joint, name)[index] = values
        return joint

    def reset_infos(self, key: str) -> np.ndarray:
        found = [lanes.reset_infos(key) for lanes, _ in self.parts]
        joint = np.empty(self.size, np.result_type(*found))
        for (_, index), values in zip(self.parts, found, strict=True):
            joint[index] = values
        return joint

    def close(self) -> None:
        for lanes, _ in self.parts:
            lanes.close()
