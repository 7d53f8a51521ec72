"""MixedEnvs: env copies that are stepped in several ways, as one ClientEnvs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, final

import numpy as np

from grpo_fed.tasks.envs.base import ClientEnvs, EnvStep, Level

CopyIndices: TypeAlias = slice | np.ndarray


def copy_indices(clients: Sequence[int], num_envs: int) -> CopyIndices:
    """Return the indices of these clients' env copies, `num_envs` each; a slice where they are consecutive."""
    if clients[-1] - clients[0] == len(clients) - 1:
        return slice(clients[0] * num_envs, (clients[-1] + 1) * num_envs)
    return (np.array(clients)[:, None] * num_envs + np.arange(num_envs)).ravel()


@final
class MixedEnvs(ClientEnvs):
    """Joins several ClientEnvs, each of which steps some of the env copies."""

    def __init__(self, parts: Sequence[tuple[ClientEnvs, CopyIndices]]) -> None:
        """parts: each with the indices of its copies; together they are all copies. All read the same cost, or none."""
        self.parts = parts
        self.observation_size, self.observation_dtype = parts[0][0].observation_size, parts[0][0].observation_dtype
        self.cost_key = parts[0][0].cost_key
        self.reproducible = all(envs.reproducible for envs, _ in parts)
        names = np.empty(sum(envs.size for envs, _ in parts), object)
        for envs, indices in parts:
            names[indices] = envs.names
        self.names = tuple(names)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        observations = np.empty((self.size, self.observation_size), self.observation_dtype)
        for envs, indices in self.parts:
            observations[indices] = envs.reset(seeds[indices])
        return observations

    def set_levels(self, levels: Mapping[int, Level]) -> None:
        all_copies = np.arange(self.size)
        for envs, indices in self.parts:
            copies = enumerate(all_copies[indices].tolist())
            envs.set_levels({inner: levels[copy] for inner, copy in copies if copy in levels})

    def resume(self, seeds: np.ndarray, episodes: np.ndarray, actions: Sequence[np.ndarray]) -> np.ndarray:
        observations = np.empty((self.size, self.observation_size), self.observation_dtype)
        all_copies = np.arange(self.size)
        for envs, indices in self.parts:
            actions_of_part = [actions[copy] for copy in all_copies[indices].tolist()]
            observations[indices] = envs.resume(seeds[indices], episodes[indices], actions_of_part)
        return observations

    def step(self, actions: np.ndarray, restart: bool = True) -> EnvStep:
        shape = (self.size, self.observation_size)
        joint = EnvStep(
            np.empty(shape, self.observation_dtype),
            np.empty(shape, self.observation_dtype),
            np.empty(self.size),
            np.empty(self.size, bool),
            np.empty(self.size, bool),
            np.empty(self.size, bool),
            None if self.cost_key is None else np.empty(self.size),
        )
        for envs, indices in self.parts:
            step = envs.step(actions[indices], restart)
            for name, values in vars(step).items():
                if values is not None:
                    getattr(joint, name)[indices] = values
        return joint

    def reset_infos(self, key: str) -> np.ndarray:
        values_of_parts = [envs.reset_infos(key) for envs, _ in self.parts]
        joint = np.empty(self.size, np.result_type(*values_of_parts))
        for (_, indices), values in zip(self.parts, values_of_parts, strict=True):
            joint[indices] = values
        return joint

    def close(self) -> None:
        for envs, _ in self.parts:
            envs.close()
