"""Group penalties and their proximal steps, which give exact zeros, for K clients at once.

    weight * sum_g sqrt(n_g) ||x_g||_2  +  l1 * ||x||_1  (sparse-group)  +  outer * sum_b sqrt(n_b) ||x_b||_2  (nested)

The penalty is on the parameters x [K, P] themselves, or on their departure from an anchor. With the step length h_i of
each parameter, as Adam has it, the proximal step is that of preconditioned.py: it minimises loss + penalty. With one
length t for all it solves min over z of 1/2 ||z - x||^2 + t * penalty(z) exactly: Yuan & Lin 2006 for groups; for a sum
over the levels of a tree (entries in groups in blocks) the steps of the levels one after another, innermost first
(Jenatton et al. 2011, theorem 1). Parameters in no group do not change. Norms are taken in float64, where squares of
float32 neither overflow nor vanish.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from grpo_fed.policy.groups import Groups
from grpo_fed.rl.preconditioned import preconditioned_group, preconditioned_nested, preconditioned_sparse_group
from grpo_fed.scenario.settings import PenaltySettings


def proximal(
    x: Tensor,
    anchor: Tensor | None,
    settings: PenaltySettings,
    groups: Groups,
    step: Tensor | float,
    weight: Tensor | float,
) -> Tensor:
    """Take the proximal step of a scenario's penalty, [K, P] -> [K, P]: toward zero, or toward an anchor.

    A parameter is exactly the anchor's where its departure is gone, and exactly what it was where nothing penalises it
    (but a zero's sign may change).

    anchor: [K, P], with `penalty.toward = "shared"`; else None.
    step: [K, 1] or a number, the length of the optimiser's step before.
    weight: [K, 1] or a number, the weight of the groups' norms, which may differ between clients.
    """
    threshold, l1, outer = step * weight, step * settings.l1, step * settings.outer
    departure = _departure(x, anchor, settings)
    match settings.kind:
        case "group":
            shrunk, strength = proximal_group(departure, groups, threshold), threshold
        case "sparse-group":
            shrunk, strength = proximal_sparse_group(departure, groups, threshold, l1), threshold + l1
        case "nested":
            shrunk, strength = proximal_nested(departure, groups, threshold, outer), threshold + outer
        case _:
            assert_never(settings.kind)
    return _from_anchor(shrunk, x, anchor, groups, _column(strength, x))


def preconditioned_proximal(
    x: Tensor,
    anchor: Tensor | None,
    settings: PenaltySettings,
    groups: Groups,
    steps: Tensor,
    weight: Tensor | float,
) -> Tensor:
    """Take the same step as `proximal`, but with a length of its own for each parameter.

    steps: [K, P], the lengths of the optimiser's step before.
    """
    departure, weight = _departure(x, anchor, settings), _column(weight, x)
    match settings.kind:
        case "group":
            shrunk, strength = preconditioned_group(departure, steps, groups, weight), weight
        case "sparse-group":
            shrunk = preconditioned_sparse_group(departure, steps, groups, weight, settings.l1)
            strength = weight + settings.l1
        case "nested":
            shrunk = preconditioned_nested(departure, steps, groups, weight, settings.outer)
            strength = weight + settings.outer
        case _:
            assert_never(settings.kind)
    return _from_anchor(shrunk, x, anchor, groups, strength * steps)


def _departure(x: Tensor, anchor: Tensor | None, settings: PenaltySettings) -> Tensor:
    assert (anchor is None) == (settings.toward == "zero"), "an anchor exactly when the penalty is toward the shared"
    return x if anchor is None else x - anchor


def _from_anchor(shrunk: Tensor, x: Tensor, anchor: Tensor | None, groups: Groups, strength: Tensor) -> Tensor:
    """Add the anchor to a shrunk departure [K, P]; where the strength, [K, 1] or [K, P], is 0 it gives x itself."""
    if anchor is None:
        return shrunk
    penalised = groups.in_a_group * strength.sign()
    return torch.lerp(x, shrunk.add_(anchor), penalised)  # anchor + (x - anchor) is not x bit for bit; at 0 this is


def proximal_group(x: Tensor, groups: Groups, threshold: Tensor | float) -> Tensor:
    """Shorten each group of x [K, P] by threshold * sqrt(n_g), to exactly 0 where it was no longer than that.

    threshold: [K, 1] or a number.
    """
    factors = _factors(_norms(x, groups), _column(threshold, groups.sqrt_sizes) * groups.sqrt_sizes)
    return _scaled(x, factors, groups)


def proximal_sparse_group(x: Tensor, groups: Groups, threshold: Tensor | float, l1: Tensor | float) -> Tensor:
    """Move each entry of x [K, P] towards 0 by l1, [K, 1] or a number, then shorten the groups as `proximal_group`."""
    limits = _column(l1, x).clamp(max=torch.finfo(x.dtype).max) * groups.in_a_group
    return proximal_group(x.abs().sub_(limits).relu_().copysign_(x), groups, threshold)


def proximal_nested(x: Tensor, groups: Groups, threshold: Tensor | float, outer: Tensor | float) -> Tensor:
    """Shorten each group of x [K, P] as `proximal_group`, then each block by outer; [K, 1] or numbers."""
    norms, blocks = _norms(x, groups), groups.as_blocks
    factors = _factors(norms, _column(threshold, norms) * groups.sqrt_sizes)
    of_blocks = _factors(_block_norms(factors * norms, groups), _column(outer, norms) * blocks.sqrt_sizes)
    return _scaled(x, factors * of_blocks.index_select(1, groups.block_of_group), groups)


def penalty_value(
    x: Tensor, anchor: Tensor | None, settings: PenaltySettings, groups: Groups, weight: Tensor | float
) -> Tensor:
    """The value of the penalty at x [K, P], [K]; anchor and weight as in `proximal`."""
    departure = x if anchor is None else x - anchor
    norms = _norms(departure, groups)
    value = (_column(weight, norms) * groups.sqrt_sizes * norms).sum(1)
    if settings.kind == "sparse-group":
        value = value + settings.l1 * (departure.abs().double() * groups.in_a_group).sum(1)
    if settings.kind == "nested":
        value = value + settings.outer * (groups.as_blocks.sqrt_sizes * _block_norms(norms, groups)).sum(1)
    return value.to(x.dtype)


def penalty_metrics(
    x: Tensor, anchor: Tensor | None, settings: PenaltySettings, groups: Groups, weight: Tensor | float
) -> dict[str, Tensor]:
    """What a client reports of its penalty at x [K, P], by the metrics' keys, [K] each; anchor and weight as before."""
    norms = _norms(_departure(x, anchor, settings), groups)
    of_blocks = zip(groups.as_blocks.names, _block_norms(norms, groups).unbind(1), strict=True)
    return {
        "penalty/value": penalty_value(x, anchor, settings, groups, weight),
        "penalty/zeros": (norms == 0).double().mean(1),
        **{f"penalty_norm/{block}": norm for block, norm in of_blocks},
    }


def group_norms(x: Tensor, groups: Groups) -> Tensor:
    """The Euclidean norm of each group for each client, [K, P] -> [K, G]."""
    return _norms(x, groups).to(x.dtype)


def _norms(x: Tensor, groups: Groups) -> Tensor:
    """The same as `group_norms`, in float64."""
    return groups.sums(x.to(torch.float64, copy=True).square_()).sqrt()


def _block_norms(norms: Tensor, groups: Groups) -> Tensor:
    """The norm of each block's grouped parameters, from the groups' norms, [K, G] -> [K, B]."""
    sums = norms.new_zeros(len(norms), len(groups.as_blocks.names))
    return sums.index_add_(1, groups.block_of_group, norms.square()).sqrt()


def _factors(norms: Tensor, limits: Tensor) -> Tensor:
    """The part, 0 to 1, that is left of vectors with these norms, shortened by limits; 1 for a limit of 0."""
    return torch.where(norms > limits, 1 - limits / norms, (limits == 0).to(norms.dtype))


def _scaled(x: Tensor, factors: Tensor, groups: Groups) -> Tensor:
    """Each entry of x [K, P] times the factor [K, G] of its group; entries without a group stay."""
    padded = torch.cat([factors.to(x.dtype), x.new_ones(len(x), 1)], 1)
    return padded.index_select(1, groups.ids_or_last).mul_(x)


def _column(number: Tensor | float, like: Tensor) -> Tensor:
    """A number for each client as a column, [K, 1], or [1, 1] for one number."""
    return torch.as_tensor(number, dtype=like.dtype, device=like.device).reshape(-1, 1)
