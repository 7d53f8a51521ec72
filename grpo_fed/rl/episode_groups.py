"""Groups of episodes, against whose members an episode is judged where there is no critic (`[group]`).

K clients, N copies of a client's environment, E = N episodes of a batch, F entries of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.rl.rng import Purpose, env_seeds, generator
from grpo_fed.rl.trajectories import Trajectories
from grpo_fed.scenario.settings import GroupSettings
from grpo_fed.tasks.envs import ClientEnvs

LLOYD = 100
"""Iterations of k-means at most."""


def episode_seeds(settings: GroupSettings, seeds: Sequence[int], copies: int, numbers: np.ndarray) -> np.ndarray:
    """Names of the episodes of a batch, the `numbers`-th [K] of each client, [K * copies] uint64.

    Episodes of one group begin alike where groups are made by start.
    """
    size = settings.size if settings.by == "start" else 1
    parts = [
        env_seeds(seed, Purpose.EPISODES, copies // size, int(number)).repeat(size)
        for seed, number in zip(seeds, numbers, strict=True)
    ]
    return np.concatenate(parts)


def group_episodes(
    settings: GroupSettings,
    trajectories: Trajectories,
    envs: ClientEnvs,
    policy: StackedPolicy,
    parameters: Tensor,
    seeds: Sequence[int],
    numbers: np.ndarray,
) -> Tensor:
    """The group of each copy's episode, [K, N] int64, from 0 for every client.

    parameters: [K, P], the policies whose features tell which episodes are similar.
    numbers: [K], names the random stream of a client that similar episodes are found with.
    """
    clients, _, copies, _ = trajectories.observations.shape
    match settings.by:
        case "task":
            groups = np.zeros((clients, copies), np.int64)
        case "start":
            groups = np.broadcast_to(np.arange(copies) // settings.size, (clients, copies)).copy()
        case "context":
            keys = envs.reset_infos(settings.key).reshape(clients, copies)
            groups = np.stack([np.unique(row, return_inverse=True)[1] for row in keys])
        case _:
            first = torch.from_numpy(np.ascontiguousarray(trajectories.observations[:, 0])).to(parameters.device)
            with torch.no_grad():
                features = policy.features(policy.layout.views(parameters), first).cpu()
            similar = [
                similarity_groups(feature, settings.clusters, generator(seed, Purpose.CLUSTERS, int(number)))
                for feature, seed, number in zip(features, seeds, numbers, strict=True)
            ]
            return torch.stack(similar).to(parameters.device)
    return torch.from_numpy(groups).to(parameters.device)


def similarity_groups(features: Tensor, clusters: int, generator: np.random.Generator) -> Tensor:
    """Groups of like episodes by k-means, started by k-means++ (Arthur & Vassilvitskii 2007): [E, F] -> [E] int64.

    No more than `clusters` groups, and never more than there are different features.
    """
    points = features.detach().cpu().to(torch.float64).numpy()
    centres = points[generator.integers(len(points), size=1)]
    nearest = _square_distances(points, centres)[:, 0]
    while len(centres) < clusters and nearest.sum() > 0:
        centres = np.concatenate((centres, points[[generator.choice(len(points), p=nearest / nearest.sum())]]))
        nearest = np.minimum(nearest, _square_distances(points, centres[-1:])[:, 0])
    groups = _square_distances(points, centres).argmin(1)
    for _ in range(LLOYD):
        for group in np.unique(groups):
            centres[group] = points[groups == group].mean(0)
        moved = _square_distances(points, centres).argmin(1)
        if (moved == groups).all():
            break
        groups = moved
    return torch.from_numpy(groups).to(features.device)


def _square_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[E, F], [G, F] -> [E, G]."""
    between: np.ndarray = points[:, None] - centres[None]
    distances: np.ndarray = np.einsum("egf,egf->eg", between, between)
    return distances
