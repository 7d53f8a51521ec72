"""KL between two policies of a client, and its Fisher matrix, both on observations that stay with the client.

K clients, n observations each, D entries of an observation, P parameters, M candidate policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.sites import levels_of

ENTRIES = 1 << 21
"""Numbers of single observations' gradients that are computed at a time."""


@dataclass(frozen=True, eq=False)
class MeasurementStates:
    """Observations of K clients, padded to the most that one client has."""

    observations: Tensor
    """[K, n, D]."""
    weights: Tensor
    """[K, n]: weight of each observation in a client's mean; 0 for padding."""

    @classmethod
    def of(cls, observations: Sequence[np.ndarray], device: torch.device) -> MeasurementStates:
        """Pad each client's observations, [n, D] with at least one row."""
        longest, size = max(len(rows) for rows in observations), observations[0].shape[1]
        padded = np.zeros((len(observations), longest, size), observations[0].dtype)
        weights = np.zeros((len(observations), longest), np.float32)
        for client, rows in enumerate(observations):
            padded[client, : len(rows)] = rows
            weights[client, : len(rows)] = 1 / len(rows)
        return cls(torch.from_numpy(padded).to(device), torch.from_numpy(weights).to(device))


@torch.no_grad()
def mean_kl(policy: StackedPolicy, states: MeasurementStates, old: Tensor, new: Iterable[Tensor]) -> Tensor:
    """The mean KL(old, new) over each client's observations, [M, K].

    old: [K, P], parameters; new: M of [K, P].
    """
    views = policy.layout.views
    before = policy.act(views(old), states.observations)
    after = (policy.act(views(parameters), states.observations) for parameters in new)
    return torch.stack([(policy.distribution.kl(before, each) * states.weights).sum(1) for each in after])


def fisher_diagonal(
    policy: StackedPolicy, states: MeasurementStates, parameters: Tensor, seeds: Sequence[int], number: int
) -> Tensor:
    """E[(d log pi(a) / d theta)^2] with one action sampled from the policy at each observation, [K, P] -> [K, P].

    The square of a mean is not the mean of squares, so each observation is treated as a client of its own: one with
    the same parameters and a batch of one.

    seeds: [K], names of the clients' random streams; the actions use the `number`-th of its kind.
    """
    clients, size = parameters.shape
    fisher = torch.zeros_like(parameters)
    chunk = max(1, ENTRIES // size)
    for client in range(clients):
        count = int((states.weights[client] > 0).sum())
        noise = policy.distribution.draw_noise(generator(seeds[client], Purpose.FISHER, number), (count,))
        for first in range(0, count, chunk):
            rows = slice(first, min(first + chunk, count))
            draws = torch.from_numpy(noise[rows, None]).to(parameters.device)
            squares = _score_gradients(
                policy, parameters[client], states.observations[client, rows, None], draws
            ).square_()
            fisher[client] += squares.sum(0)
        fisher[client] /= count
    return fisher


def _score_gradients(policy: StackedPolicy, parameters: Tensor, observations: Tensor, noise: Tensor) -> Tensor:
    """The gradient of log pi(a) by theta at each of n observations, [P], [n, 1, D], [n, 1, noise] -> [n, P]."""
    count = len(observations)
    gradient = parameters.new_zeros(count, len(parameters))
    views = policy.layout.views(parameters.expand(count, -1))
    output, pullback = policy.vjp(views, observations, critic=False)
    actions = policy.distribution.sample(output.distribution, noise)
    _, _, by_distribution = policy.distribution.vjp(output.distribution, actions, entropy=False)
    output_gradient = by_distribution(torch.ones_like(output.distribution[..., 0]), None)
    pullback(output_gradient, None, policy.layout.views(gradient))
    return gradient


def measures_steps(scenario: Scenario) -> bool:
    """Whether clients measure KL or Fisher matrices, and have to keep observations for it."""
    return scenario.merge.rule == "fisher" or any(level.proximity.mode != "off" for level in levels_of(scenario))
