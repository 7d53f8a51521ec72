"""How much noise a scenario adds to what, what a merge costs, and the price of privacy before a run.

G groups with bounds C_g share a merge's budget alike: the differences of a client, each group divided by its bound, are
a vector no longer than sqrt(G), so noise of standard deviation z sqrt(G) C_g on the sum of the clients' groups is a
Gaussian mechanism with the noise multiplier z. With adaptive bounds the server also releases how many clients were
within each, counted from 1/2, with noise z_b sqrt(G) / 2. Both together have the multiplier z where

    1 / z^2 = 1 / z_d^2 + 1 / z_b^2

with z_d that of the differences (1905.03871, theorem 1, for G groups). With local noise a client protects what it sends
from everybody: then neighbours differ in all that it could have learned, and the sums become single clients, so that
lengths count twice and no sampling helps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, final

import numpy as np

from grpo_fed.aggregation.privacy.accountant import Spent, epsilon_of, noise_for
from grpo_fed.policy.patterns import values_by_name
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario

SLACK = 1e-4
"""How far beyond the budget a merge may go, for rounding."""


@final
@dataclass(frozen=True, eq=False)
class Mechanism:
    """Holds what the noise of a scenario depends on, for G groups of the shared blocks."""

    clients: int
    """The clients that take part in training."""
    rate: float
    """The probability that a client takes part in a merge, as far as it counts for epsilon: 1 with local noise."""
    merges: int
    """The rounds of the run."""
    budget: float
    """Epsilon at which the run ends."""
    delta: float
    multiplier: float
    """z, of everything that a merge releases."""
    of_differences: float
    """z_d."""
    of_counts: float
    """z_b; infinite where bounds stay as they are."""
    is_local: bool
    divisor: float
    """What the server divides the sum of the differences by: the clients that it expects in a merge."""
    groups: np.ndarray
    """[S]: the group of each shared parameter."""
    bounds: np.ndarray
    """[G]: the bounds that the run begins with."""
    blocks: tuple[str, ...]
    """[G]: the block of each group."""

    @classmethod
    def of(cls, scenario: Scenario, shared_blocks: SharedBlocks) -> Self:
        """Find how much noise a scenario needs; ValueError if no noise is enough for its budget."""
        settings, clients = scenario.privacy, sum(entry.count for entry in scenario.clients if entry.trains)
        assert settings.epsilon is not None, "the scenario has a budget"
        is_local = settings.noise == "local"
        rate = 1.0 if is_local else scenario.round.fraction
        delta = default_delta(clients) if settings.delta is None else settings.delta
        try:
            found = settings.multiplier or noise_for(settings.epsilon, rate, scenario.rounds, delta)
        except ValueError as error:
            raise ValueError(f"privacy.epsilon = {settings.epsilon:g}: {error}; give more, or a larger delta") from None
        if settings.multiplier is not None and epsilon_of([Spent(found, rate, 1)], delta) > settings.epsilon:
            least = noise_for(settings.epsilon, rate, 1, delta)
            text = f"privacy.multiplier = {found:g} spends privacy.epsilon = {settings.epsilon:g} in the first merge"
            raise ValueError(
                f"{text}: give {least:.3g} at least, or leave it out, so that the budget lasts for all rounds"
            )
        share = 0.0 if is_local or not settings.rate else settings.share
        bounds = values_by_name(settings.blocks, shared_blocks.blocks, "privacy.blocks", "shared block")
        groups = shared_blocks.groups
        assert not bool(groups.ungrouped.any()), "every shared parameter is in a group"
        return cls(
            clients=clients,
            rate=rate,
            merges=scenario.rounds,
            budget=settings.epsilon,
            delta=delta,
            multiplier=found,
            of_differences=found / math.sqrt(1 - share),
            of_counts=found / math.sqrt(share) if share else math.inf,
            is_local=is_local,
            divisor=max(1.0, scenario.round.fraction * clients),
            groups=groups.ids.numpy(),
            bounds=np.array([bounds.get(block, settings.clip) for block in groups.blocks]),
            blocks=tuple(groups.blocks),
        )

    def epsilon(self, spent: Iterable[Spent]) -> float:
        """Compute epsilon of merges that were made."""
        return epsilon_of(spent, self.delta)

    def allows(self, spent: Iterable[Spent]) -> bool:
        """Decide whether merges stay within the budget."""
        return self.epsilon(spent) <= self.budget * (1 + SLACK)

    @property
    def noise_scale(self) -> float:
        """The standard deviation of the noise on a group's sum, or on what one client sends, by the group's bound."""
        return (2.0 if self.is_local else 1.0) * self.of_differences * math.sqrt(len(self.bounds))

    @property
    def count_scale(self) -> float:
        """The standard deviation of the noise on the number of clients within a bound."""
        return 0.5 * self.of_counts * math.sqrt(len(self.bounds))

    @property
    def mean_scale(self) -> float:
        """The standard deviation of the noise in a parameter of the mean, by the bound of its group."""
        return self.noise_scale / (math.sqrt(self.divisor) if self.is_local else self.divisor)

    def price_of(self, bounds: Sequence[float], block: str | None = None) -> float:
        """Compute the expected length of the noise in a block of the mean, by that of a difference at its bounds.

        bounds: [G]. block: None for all shared blocks together.
        """
        squares = np.square(bounds) * [block in (None, each) for each in self.blocks]
        sizes = np.bincount(self.groups, minlength=len(self.blocks))
        return self.mean_scale * math.sqrt(float((sizes * squares).sum() / squares.sum()))

    def bounds_of_blocks(self, bounds: Sequence[float]) -> dict[str, float]:
        """Compute the greatest length of each block of a difference whose groups are at their bounds, [G]."""
        return {
            name: math.sqrt(sum(bound**2 for bound, block in zip(bounds, self.blocks, strict=True) if block == name))
            for name in dict.fromkeys(self.blocks)
        }


def default_delta(clients: int) -> float:
    """Choose delta for so many clients: the largest power of ten that is a tenth of one over their number at most."""
    return 10.0 ** -math.ceil(math.log10(10 * clients) - 1e-9)
