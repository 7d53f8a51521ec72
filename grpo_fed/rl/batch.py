"""From trajectories to a Batch: what the policy and its critic give for them, in one pass.

K clients, T steps, N copies, D observation entries, X truncations of a client.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Parameters, StackedPolicy
from grpo_fed.rl.cost_critic import CostCritic
from grpo_fed.rl.records import Batch
from grpo_fed.rl.trajectories import Trajectories, Truncation


def make_batch(
    policy: StackedPolicy,
    parameters: Parameters,
    trajectories: Trajectories,
    rows: slice,
    critic: bool,
    cost_critic: CostCritic | None = None,
) -> Batch:
    """The trajectories of some clients as a batch.

    parameters: of these clients' policies, by name.
    rows: the clients' rows in the trajectories.
    critic: whether values are needed; without it they are 0.
    cost_critic: gives the costs' values, beside a critic; None for none.
    """
    clients, steps, copies, size = trajectories.observations[rows].shape
    device = next(iter(parameters.values())).device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[rows])).to(device)

    observations, actions = tensor(trajectories.observations), tensor(trajectories.actions)
    inputs = observations.view(clients, steps * copies, size)
    costs: dict[str, Tensor] = {} if trajectories.costs is None else {"costs": tensor(trajectories.costs)}
    with torch.no_grad():
        if critic:
            every_row = range(*rows.indices(len(trajectories.observations)))
            indices, cut_observations = _pad_truncations(trajectories.cuts, every_row, trajectories.last)
            every_input = torch.cat([inputs, tensor(trajectories.last), cut_observations.to(device)], 1)
            output = policy.forward(parameters, every_input)
            shape = (clients, steps, copies)
            values, next_values = _values(output.values, trajectories, rows, shape, indices)
            if cost_critic is not None:
                of_costs = _values(cost_critic.values(every_input), trajectories, rows, shape, indices)
                costs |= dict(zip(("cost_values", "next_cost_values"), of_costs, strict=True))
            flat = output.distribution[:, : steps * copies]
        else:
            flat = policy.act(parameters, inputs)
            values = next_values = flat.new_zeros(clients, steps, copies)
        distribution = flat.reshape(clients, steps, copies, -1)
        log_probs = policy.distribution.log_prob(distribution, actions)
    ends = trajectories.terminated[rows] | trajectories.truncated[rows]
    valid = trajectories.valid[rows]
    ends_before = np.cumsum(ends, 1) - ends
    return Batch(
        observations=observations,
        actions=actions,
        log_probs=log_probs,
        distribution=distribution,
        values=values,
        next_values=next_values,
        rewards=tensor(trajectories.rewards),
        ends=torch.from_numpy(ends).to(device),
        valid=tensor(trajectories.valid),
        episodes=torch.from_numpy(np.where(valid, ends_before * copies + np.arange(copies), 0)).to(device),
        **costs,
    )


def _pad_truncations(
    truncations: Sequence[Truncation], rows: range, last: np.ndarray
) -> tuple[list[tuple[int, int, int, int]], Tensor]:
    """The observations that these clients' episodes were truncated at, [K, X, D] with zeros as padding.

    last: [K, N, D], observations of the same size and type. Gives first the indices (k, t, n, x) of each.
    """
    chosen = [truncation for truncation in truncations if truncation.client in rows]
    counts = [0] * len(rows)
    indices = []
    for truncation in chosen:
        row = truncation.client - rows.start
        indices.append((row, truncation.t, truncation.copy, counts[row]))
        counts[row] += 1
    padded = np.zeros((len(rows), max(counts), last.shape[-1]), last.dtype)
    for (row, _, _, x), truncation in zip(indices, chosen, strict=True):
        padded[row, x] = truncation.observation
    return indices, torch.from_numpy(padded)


def _values(
    output: Tensor,
    trajectories: Trajectories,
    rows: slice,
    shape: tuple[int, int, int],
    truncations: list[tuple[int, int, int, int]],
) -> tuple[Tensor, Tensor]:
    """Values of the observations and of those that came after, [K, T, N] each.

    output: [K, X], values of all steps, then of the last observations, then of those that episodes were truncated at.
    truncations: the indices (k, t, n, x) of the latter.
    """
    clients, steps, copies = shape
    every = output[:, : (steps + 1) * copies].view(clients, steps + 1, copies)
    values, next_values = every[:, :-1], every[:, 1:].clone()
    if truncations:
        k, t, n, x = torch.tensor(truncations, device=values.device).T
        next_values[k, t, n] = output[:, (steps + 1) * copies :][k, x]
    terminated = torch.from_numpy(np.ascontiguousarray(trajectories.terminated[rows])).to(values.device)
    return values, next_values.masked_fill_(terminated, 0.0)
