"""What hostile clients send in place of their parameters: pure functions, for tests of merge rules and for scenarios.

The first kind needs a client's own honest reply alone; the second, of clients that collude, knows what all honest
clients sent in the same round, and the merge rule, as the strongest attacker of the literature does. K honest clients,
P parameters; s [P] are the shared blocks that the round began with, and d_k = theta_k - s a client's honest update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

import torch
from torch import Tensor

from grpo_fed.aggregation.merge.distances import squared_distances

# From a client's own reply -------------------------------------------------------------------------------------------


def reverse(point: Tensor, shared: Tensor, strength: float) -> Tensor:
    """Send s - strength d, a step away from what was learned: `sign-flip` and, beside their lies, other attacks."""
    return shared - strength * (point - shared)


def scale(point: Tensor, shared: Tensor, strength: float) -> Tensor:
    """Send s + strength d, so far along what was learned that nothing works there any more."""
    return shared + strength * (point - shared)


def random_step(point: Tensor, shared: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Send s plus a step in a random direction, strength times as long as d."""
    noise = torch.randn(point.shape, generator=generator, dtype=torch.float64)
    length = float((point - shared).double().norm())
    return shared + (strength * length / max(float(noise.norm()), 1e-30)) * noise


# From all honest replies ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HonestRound:
    """What colluding clients know of a round."""

    points: Tensor
    """[K, P] float64: what the honest clients sent, one or more."""
    shared: Tensor
    """[P] float64: what the round began with."""
    hostile: int
    """Number of colluding clients."""
    merge: Callable[[Tensor], Tensor]
    """Where the server would move the shared blocks if all colluding clients sent this point, [P] -> [P]."""

    @property
    def mean(self) -> Tensor:
        """The mean of the honest points, [P]."""
        return self.points.mean(0)

    @property
    def spread(self) -> Tensor:
        """The standard deviation of the honest points, parameter by parameter, [P]; 0 for a single one."""
        return self.points.std(0) if len(self.points) > 1 else torch.zeros_like(self.shared)


def alie(round: HonestRound, strength: float | None) -> Tensor:
    """Send mean - z spread: a little is enough (Baruch et al. 2019, 1902.06156).

    strength: z; by default the largest one at which enough honest clients are further away from the mean than the
    colluding ones, so that these count among the majority: of n clients and f hostile ones, Phi(z) = (n - f - m) /
    (n - f) with m = floor(n / 2 + 1) - f.
    """
    if strength is None:
        honest = len(round.points)
        needed = (honest + round.hostile) // 2 + 1 - round.hostile
        share = min(max((honest - needed) / honest, 0.5), 1 - 1e-3)
        strength = NormalDist().inv_cdf(share)
    return round.mean - strength * round.spread


def inner_product(round: HonestRound, strength: float | None) -> Tensor:
    """Send s - strength times the honest mean update, by default 0.5 (IPM, Xie et al. 2019, 1903.03936)."""
    return reverse(round.mean, round.shared, 0.5 if strength is None else strength)


def mimic(round: HonestRound, strength: float | None) -> Tensor:
    """Send what one honest client sent, over-weighting it (Karimireddy et al. 2022, 2006.09365).

    It is the client furthest out along the direction in which honest clients differ most.
    """
    del strength
    centred = round.points - round.mean
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    along = vectors[:, -1] * values[-1].clamp(min=0).sqrt()
    return round.points[int(along.abs().argmax())]


def min_max(round: HonestRound, strength: float | None) -> Tensor:
    """Send mean - gamma u with u the direction of the mean update, as far as no distance gives it away.

    gamma is the largest at which no honest client is further away from the point than the two honest clients that
    differ most are from each other (Shejwalkar & Houmansadr 2021).
    """
    del strength
    return _back_within(round, math.sqrt(float(_between(round.points).max())), round.points)


def stealth(round: HonestRound, strength: float | None) -> Tensor:
    """Send, for each parameter, the honest value that goes furthest against the mean update, shortened to pass.

    Every parameter stays within the range of the honest ones, and the point is no further from their mean than the
    median honest client: neither a rule that trims nor one that measures distances can tell it from an honest reply.
    """
    del strength
    low, high = round.points.min(0).values, round.points.max(0).values
    away = torch.where(round.mean > round.shared, low, high) - round.mean
    usual = float((round.points - round.mean).norm(dim=1).median())
    length = float(away.norm())
    return round.mean + away * min(1.0, usual / length if length > 0 else 1.0)


STEPS = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
"""The lengths that `normalised` tries, in honest mean updates."""


def normalised(round: HonestRound, strength: float | None) -> Tensor:
    """Send the step that turns the merged update furthest (the normalized attack, Fang et al. 2025, 2502.08123).

    Of steps against the honest mean update, against its signs, from the shared blocks and from the honest mean, the one
    with the largest || g / ||g|| - g* / ||g*|| ||, where g* is the update that the server's rule makes of honest
    replies and this one, and g that of the honest mean in its place.
    """
    del strength
    update = round.mean - round.shared
    length = float(update.norm())
    if length == 0:
        return round.mean
    signs = update.sign() * (length / max(float(update.sign().norm()), 1.0))
    before = _unit(round.merge(round.mean) - round.shared)
    best, furthest = round.mean, -1.0
    for origin in (round.shared, round.mean):
        for direction in (update, signs):
            for step in STEPS:
                point = origin - step * direction
                turned = float((_unit(round.merge(point) - round.shared) - before).norm())
                if turned > furthest:
                    best, furthest = point, turned
    return best


COLLUDING: Mapping[str, Callable[[HonestRound, float | None], Tensor]] = MappingProxyType(
    {
        "alie": alie,
        "ipm": inner_product,
        "mimic": mimic,
        "min-max": min_max,
        "normalised": normalised,
        "stealth": stealth,
    }
)
"""Attacks that need what the honest clients sent, by the names of a scenario; `strength` is None for the default."""


def _back_within(round: HonestRound, most: float, points: Tensor) -> Tensor:
    """Go from the mean against the mean update until some honest point is at the distance `most`.

    For each honest point the distance is the larger root of ||mean - gamma u - theta_k||^2 = most^2.
    """
    direction = -_unit(round.mean - round.shared)
    gammas = []
    for point in points:
        offset = round.mean - point
        along = float(direction @ offset)
        gammas.append(-along + math.sqrt(max(along**2 - float(offset @ offset) + most**2, 0.0)))
    return round.mean + max(min(gammas), 0.0) * direction


def _between(points: Tensor) -> Tensor:
    """Compute the squared distances between points, [K, P] -> [K, K]."""
    return squared_distances(list(points), points.mean(0), torch.arange(points.shape[1]))


def _unit(vector: Tensor) -> Tensor:
    """Scale a vector to length 1; a vector of 0 stays."""
    length = float(vector.norm())
    return vector / length if length > 0 else vector
