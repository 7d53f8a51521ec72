"""The natural-gradient step for K stacked clients: conjugate gradient on the Fisher matrix, then a line search.

Clients share no parameters, so the Fisher matrix of the fleet is block-diagonal: one product serves all of them, and
only the scalars of the conjugate gradient are kept apart, [K, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK, TRIES = 0.8, 10


def fisher_product(kl: Tensor, leaves: Sequence[Tensor], damping: float) -> Callable[[Tensor], Tensor]:
    """The product v -> (F + damping) v, [K, P] -> [K, P], of the KL [K] at the point where it is 0.

    There the Hessian of the KL is the Fisher matrix (Schulman et al., 1502.05477, appendix C).
    """
    gradient = flat_gradient(kl.sum(), leaves, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        return flat_gradient((gradient * vector).sum(), leaves, retain_graph=True) + damping * vector

    return product


def flat_gradient(
    total: Tensor, leaves: Sequence[Tensor], create_graph: bool = False, retain_graph: bool | None = None
) -> Tensor:
    """Gradient of a scalar by leaves [K, ...] as one [K, P]; 0 where a leaf does not matter."""
    parts = torch.autograd.grad(
        total, leaves, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )
    return torch.cat([part.flatten(1) for part in parts], 1)


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """Solve product(x) = target for each client, [K, P]; one whose residual is small beside its target stops there.

    `tolerance` is the part of the target's square that may be left: a direction depends on no scale of rewards.
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    square = (residual * residual).sum(1, keepdim=True)
    enough = tolerance * square
    for _ in range(iterations):
        going = square > enough
        if not going.any():
            break
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        going &= curvature > 0  # without damping there may be none, and no end to the step
        pace = torch.where(going, square / curvature, 0.0)
        solution = solution + pace * direction
        residual = residual - pace * image
        fresh = (residual * residual).sum(1, keepdim=True)
        direction = residual + torch.where(going, fresh / square, 0.0) * direction
        square = torch.where(going, fresh, square)
    return solution


@dataclass(frozen=True)
class LineSearchResult:
    """What a line search came to."""

    scale: Tensor
    """[K, 1]: of the full step; 0 where none was good."""
    kl: Tensor
    """[K]: of the step taken."""
    gain: Tensor
    """[K]: of the surrogate, by the step taken."""


def line_search(measure: Callable[[Tensor], tuple[Tensor, Tensor]], limit: Tensor, start: Tensor) -> LineSearchResult:
    """The longest of the steps 1, 0.8, 0.64, ... that keeps the KL within `limit` [K] and raises the surrogate.

    `measure(scale [K, 1])` gives the KL [K] and the surrogate [K] there; `start` [K] is the surrogate at the old point.
    """
    clients = limit.shape[0]
    scale = torch.ones(clients, 1, device=limit.device)
    found = torch.zeros(clients, dtype=torch.bool, device=limit.device)
    kept_kl, kept_gain = torch.zeros_like(limit), torch.zeros_like(limit)
    for _ in range(TRIES):
        kl, surrogate = measure(scale)
        good = (kl <= limit) & (surrogate > start) & ~found
        kept_kl, kept_gain = torch.where(good, kl, kept_kl), torch.where(good, surrogate - start, kept_gain)
        found |= good
        if found.all():
            break
        scale = torch.where(found[:, None], scale, scale * SHRINK)
    return LineSearchResult(torch.where(found[:, None], scale, 0.0), kept_kl, kept_gain)
