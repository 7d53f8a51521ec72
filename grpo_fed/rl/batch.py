"""Completing what was lived through to a Batch: what the policy and its critic say of it, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Parameters, PolicyOutput, StackedPolicy
from grpo_fed.rl.records import Batch
from grpo_fed.rl.rollout import Trajectories, Truncation


def make_batch(policy: StackedPolicy, parameters: Parameters, done: Trajectories, rows: slice, critic: bool) -> Batch:
    """Some clients' trajectories with what the policy says of them, and its critic where it is asked (else 0)."""
    clients, steps, copies, size = done.observations[rows].shape
    device = next(iter(parameters.values())).device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[rows])).to(device)

    observations, actions = tensor(done.observations), tensor(done.actions)
    acted_on = observations.view(clients, steps * copies, size)
    with torch.no_grad():
        if critic:
            cut, cut_observations = _padded(done.cuts, range(*rows.indices(len(done.observations))), size)
            said = policy.forward(parameters, torch.cat([acted_on, tensor(done.last), cut_observations.to(device)], 1))
            values, next_values = _values(said, done, rows, (clients, steps, copies), cut)
            flat = said.distribution[:, : steps * copies]
        else:
            flat = policy.act(parameters, acted_on)
            values = next_values = flat.new_zeros(clients, steps, copies)
        distribution = flat.reshape(clients, steps, copies, -1)
        log_probs = policy.distribution.log_prob(distribution, actions)
    ends = done.terminated[rows] | done.truncated[rows]
    before = np.cumsum(ends, 1) - ends
    return Batch(
        observations=observations,
        actions=actions,
        log_probs=log_probs,
        distribution=distribution,
        values=values,
        next_values=next_values,
        rewards=tensor(done.rewards),
        ends=torch.from_numpy(ends).to(device),
        valid=tensor(done.valid),
        episodes=torch.from_numpy(np.where(done.valid[rows], before * copies + np.arange(copies), 0)).to(device),
    )


def _padded(cuts: Sequence[Truncation], rows: range, size: int) -> tuple[list[tuple[int, int, int, int]], Tensor]:
    """Observations that these clients' episodes were cut at, [K, X, D] with zeros behind; and (k, t, n, x) of each."""
    mine = [cut for cut in cuts if cut.client in rows]
    counts = [0] * len(rows)
    places = []
    for cut in mine:
        row = cut.client - rows.start
        places.append((row, cut.t, cut.copy, counts[row]))
        counts[row] += 1
    padded = np.zeros((len(rows), max(counts), size), np.float32)
    for (row, _, _, x), cut in zip(places, mine, strict=True):
        padded[row, x] = cut.observation
    return places, torch.from_numpy(padded)


def _values(
    said: PolicyOutput,
    done: Trajectories,
    rows: slice,
    shape: tuple[int, int, int],
    cut: list[tuple[int, int, int, int]],
) -> tuple[Tensor, Tensor]:
    """Values of the observations and of what came after, [K, T, N] each; the last and the cut ones stand behind."""
    clients, steps, copies = shape
    every = said.values[:, : (steps + 1) * copies].view(clients, steps + 1, copies)
    values, next_values = every[:, :-1], every[:, 1:].clone()
    if cut:
        k, t, n, x = torch.tensor(cut, device=values.device).T
        next_values[k, t, n] = said.values[:, (steps + 1) * copies :][k, x]
    terminated = torch.from_numpy(np.ascontiguousarray(done.terminated[rows])).to(values.device)
    return values, next_values.masked_fill_(terminated, 0.0)
