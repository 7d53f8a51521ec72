"""How far apart two policies of a client are, and how fast it gets there: both on states that it kept for that.

K clients, n states, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Policy, StackedPolicy
from grpo_fed.rl.rng import Purpose, generator

ENTRIES = 1 << 21
"""Numbers of single states' gradients that are worked out at a time."""


@dataclass(frozen=True, eq=False)
class MeasurementStates:
    """Kept states of K clients, filled up to the most that one has."""

    observations: Tensor
    """[K, n, D]."""
    weights: Tensor
    """[K, n]: in a client's mean; 0 for what only fills up."""

    @classmethod
    def of(cls, kept: Sequence[np.ndarray], device: torch.device) -> MeasurementStates:
        """[n, D] of each client, which must have some."""
        size, width = max(len(states) for states in kept), kept[0].shape[1]
        observations = np.zeros((len(kept), size, width), np.float32)
        weights = np.zeros((len(kept), size), np.float32)
        for row, states in enumerate(kept):
            observations[row, : len(states)] = states
            weights[row, : len(states)] = 1 / len(states)
        return cls(torch.from_numpy(observations).to(device), torch.from_numpy(weights).to(device))


@torch.no_grad()
def mean_kl(policy: Policy, states: MeasurementStates, old: Tensor, new: Iterable[Tensor]) -> Tensor:
    """KL(old, new) of what is done, in the mean over each client's states, for each of M new ones.

    old: [K, P]; new: M of [K, P] -> [M, K].
    """
    views = policy.layout.views
    before = policy.act(views(old), states.observations)
    after = (policy.act(views(each), states.observations) for each in new)
    return torch.stack([(policy.distribution.kl(before, one) * states.weights).sum(1) for one in after])


def fisher_diagonal(
    policy: StackedPolicy, states: MeasurementStates, parameters: Tensor, seeds: Sequence[int], number: int
) -> Tensor:
    """E[(d log pi(a) / d theta)^2], an action of the policy's own drawn at each state: [K, P] -> [K, P].

    Actions come from each client's stream, the `number`-th of its kind. The square of a mean is not the mean of
    squares, so each state is a client of its own here: one with the same parameters and a batch of one.
    """
    clients, size = parameters.shape
    found = torch.zeros_like(parameters)
    step = max(1, ENTRIES // size)
    for client in range(clients):
        count = int((states.weights[client] > 0).sum())
        noise = policy.distribution.draw_noise(generator(seeds[client], Purpose.FISHER, number), (count,))
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            draws = torch.from_numpy(noise[rows, None]).to(parameters.device)
            squares = _score_gradients(
                policy, parameters[client], states.observations[client, rows, None], draws
            ).square_()
            found[client] += squares.sum(0)
        found[client] /= count
    return found


def _score_gradients(policy: StackedPolicy, parameters: Tensor, observations: Tensor, noise: Tensor) -> Tensor:
    """The gradient of log pi(a) by theta at each of n states, [P], [n, 1, D], [n, 1, noise] -> [n, P]."""
    count = len(observations)
    gradient = parameters.new_zeros(count, len(parameters))
    views = policy.layout.views(parameters.expand(count, -1))
    said, pullback = policy.vjp(views, observations, critic=False)
    actions = policy.distribution.sample(said.distribution, noise)
    _, _, by_parameters = policy.distribution.vjp(said.distribution, actions, entropy=False)
    slopes = by_parameters(torch.ones_like(said.distribution[..., 0]), None)
    pullback(slopes, None, policy.layout.views(gradient))
    return gradient
