"""The natural-gradient step for K stacked clients: conjugate gradient on the Fisher matrix, then a line search.

Clients have no parameters in common here, so the Fisher matrix of the stack is block-diagonal: one product serves all
of them, and only the scalars of the conjugate gradient differ, [K, 1].
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
    """The gradient of a scalar by leaves [K, ...] as one [K, P]; 0 for leaves that it does not depend on."""
    parts = torch.autograd.grad(
        total, leaves, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )
    return torch.cat([part.flatten(1) for part in parts], 1)


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """Solve product(x) = target for each client, [K, P] -> [K, P]; a client with a small residual stops early.

    tolerance: the part of the target's square that may be left, so that a direction does not depend on the rewards'
    scale.
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    square = (residual * residual).sum(1, keepdim=True)
    enough = tolerance * square
    for _ in range(iterations):
        unsolved = square > enough
        if not unsolved.any():
            break
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        unsolved &= curvature > 0  # without damping it may be 0, and the step would have no end
        length = torch.where(unsolved, square / curvature, 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        new_square = (residual * residual).sum(1, keepdim=True)
        direction = residual + torch.where(unsolved, new_square / square, 0.0) * direction
        square = torch.where(unsolved, new_square, square)
    return solution


@dataclass(frozen=True)
class LineSearchResult:
    """The steps that a line search has chosen."""

    scale: Tensor
    """[K, 1]: the part of the full step; 0 where no step was good."""
    kl: Tensor
    """[K]: KL of the chosen step."""
    gain: Tensor
    """[K]: rise of the surrogate by the chosen step."""


def line_search(measure: Callable[[Tensor], tuple[Tensor, Tensor]], limit: Tensor, start: Tensor) -> LineSearchResult:
    """Find the longest of the steps 1, 0.8, 0.64, ... that keeps the KL within a limit and raises the surrogate.

    measure: gives KL [K] and surrogate [K] at parts [K, 1] of the full step.
    limit: [K], of the KL.
    start: [K], the surrogate at the old point.
    """
    clients = limit.shape[0]
    scale = torch.ones(clients, 1, device=limit.device)
    done = torch.zeros(clients, dtype=torch.bool, device=limit.device)
    chosen_kl, gain = torch.zeros_like(limit), torch.zeros_like(limit)
    for _ in range(TRIES):
        kl, surrogate = measure(scale)
        good = (kl <= limit) & (surrogate > start) & ~done
        chosen_kl, gain = torch.where(good, kl, chosen_kl), torch.where(good, surrogate - start, gain)
        done |= good
        if done.all():
            break
        scale = torch.where(done[:, None], scale, scale * SHRINK)
    return LineSearchResult(torch.where(done[:, None], scale, 0.0), chosen_kl, gain)
