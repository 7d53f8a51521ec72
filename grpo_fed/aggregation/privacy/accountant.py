"""What a run's merges cost in privacy: Renyi differential privacy of a Gaussian mechanism on a sampled part.

A merge adds Gaussian noise of standard deviation z to a sum that one client moves by at most 1, over clients of which
each takes part with probability q, independently of the others (Poisson sampling). Neighbours are federations with and
without one client. Its Renyi divergence of order a (Mironov et al. 2019, 1908.10530, theorem 4) is

    D(a) = log(A(a)) / (a - 1),   A(a) = E[((1 - q) + q exp((2 x - 1) / (2 z^2)))^a],   x ~ N(0, z^2),

which is a / (2 z^2) for q = 1. Divergences of merges add up, and epsilon follows from them (Balle et al. 2020,
1905.09982, theorem 21; Canonne et al. 2020, 2004.00010, proposition 12).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import final

import numpy as np

ORDERS = (*(1 + step / 10 for step in range(1, 100)), *range(11, 64), *(64, 80, 96, 128, 192, 256, 384, 512))
"""The orders of the divergence; the best of them gives epsilon."""
LEAST_NOISE, MOST_NOISE = 0.2, 1e5
"""The noise multipliers among which one is searched."""
ENOUGH = 1e-5
"""How near to the least noise multiplier the one is that is found."""


@final
@dataclass(frozen=True)
class Spent:
    """Counts equal merges."""

    noise: float
    """z, in units of what one client can move the sum by."""
    rate: float
    """q, the probability that a client takes part in a merge."""
    merges: int


def epsilon_of(spent: Iterable[Spent], delta: float) -> float:
    """Compute epsilon of all these merges together; 0 without any."""
    known = [each for each in spent if each.merges]
    if not known:
        return 0.0

    def epsilon(order: float) -> float:
        spent_divergence = math.fsum(each.merges * renyi_divergence(order, each.noise, each.rate) for each in known)
        return max(0.0, spent_divergence - math.log(delta * order) / (order - 1) + math.log1p(-1 / order))

    return min(map(epsilon, ORDERS))


@cache
def noise_for(epsilon: float, rate: float, merges: int, delta: float) -> float:
    """Find the noise multiplier z with which so many merges cost epsilon, or hardly less.

    What is enough without sampling is enough with it, and is found faster, so the search ends there. ValueError if no
    noise is enough.
    """
    low, high = LEAST_NOISE, MOST_NOISE if rate == 1 else noise_for(epsilon, 1.0, merges, delta)
    if epsilon_of([Spent(high, rate, merges)], delta) > epsilon:
        raise ValueError(f"no noise makes epsilon {epsilon:g} of {merges} merges with delta {delta:g}")
    while high > low * (1 + ENOUGH):
        middle = math.sqrt(low * high)
        is_enough = epsilon_of([Spent(middle, rate, merges)], delta) <= epsilon
        low, high = (low, middle) if is_enough else (middle, high)
    return high


@cache
def renyi_divergence(order: float, noise: float, rate: float) -> float:
    """Compute the divergence of one merge, by the trapezoidal rule.

    The integrand is analytic and has the tails of a Gaussian, so the rule's error falls exponentially with its step:
    zeros of the mixture, the nearest singularities, are pi z^2 away from the real axis.
    """
    if rate == 1:
        return order / (2 * noise**2)
    step = min(noise, noise**2) / 8
    x = np.arange(-12 * noise, order + 12 * noise, step)
    log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    log_integrand = order * log_ratio - x**2 / (2 * noise**2)
    largest = float(log_integrand.max())
    log_sum = largest + math.log(float(np.exp(log_integrand - largest).sum()))
    log_moment = log_sum + math.log(step) - math.log(noise * math.sqrt(2 * math.pi))
    return max(0.0, log_moment) / (order - 1)
