"""Replies and parameter groups for tests of merge rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import Replies, Reply
from grpo_fed.policy.groups import Groups

P = 12
IDS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1]
"""Groups a1 and a2 of four parameters in block a, one of two in block b, and two parameters in none."""


def make_groups(ids: Sequence[int], blocks: Sequence[str] | None = None) -> Groups:
    """Make groups from the group of each parameter; each lies in a block of its own unless `blocks` says otherwise."""
    sizes = np.bincount([i for i in ids if i >= 0])
    names = tuple(f"group {number}" for number in range(len(sizes)))
    return Groups(names, torch.tensor(ids), torch.tensor(sizes).float(), tuple(blocks or names))


GROUPS = make_groups(IDS, ["a", "a", "b"])


def make_replies(points: Tensor, weights: Sequence[float] | None = None, fishers: Tensor | None = None) -> Replies:
    """Make the replies of clients c00, c01, ... from their points [K, P]; all have weight 1 if no weights are given."""
    return Replies.of(
        Reply(
            f"c{number:02d}",
            point,
            1.0 if weights is None else weights[number],
            None if fishers is None else fishers[number],
        )
        for number, point in enumerate(points)
    )


def random_replies(seed: int, clients: int = 7, size: int = P) -> tuple[Replies, Tensor]:
    """Draw replies and a shared vector; two clients are far from the others, and weights are no round numbers."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, size))
    points[:2] += 8 * generator.normal(size=(1, size))
    weights = generator.uniform(0.1, 2.0, clients).tolist()
    fishers = torch.from_numpy(generator.exponential(size=(clients, size))).float()
    shared = torch.from_numpy(generator.normal(size=size)).float()
    return make_replies(torch.from_numpy(points).float(), weights, fishers), shared


def bits(value: Tensor) -> list[int]:
    """Return the bits of float32 numbers as integers, to compare them exactly."""
    assert value.dtype == torch.float32
    return value.view(torch.int32).tolist()
