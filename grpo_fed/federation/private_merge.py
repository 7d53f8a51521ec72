"""A round's merge with differential privacy: the sum of differences that are cut to bounds, and noise.

With central noise the server cuts the difference of each client as it comes, and adds noise to the sum, once. With
local noise clients have cut and noised what they send (`add_local_noise`), and the server takes their mean. The server
divides by the number of clients that it expects, not by that of those that answered, which one client changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.privacy.accountant import Spent
from grpo_fed.aggregation.privacy.clipping import cut_to_bounds, next_bounds
from grpo_fed.aggregation.privacy.mechanism import Mechanism
from grpo_fed.aggregation.privacy.noise import standard_noise
from grpo_fed.federation.messages import Start, Trained
from grpo_fed.federation.round_merge import MergeTarget
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.rng import Purpose, generator
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True)
class PrivacyState:
    """Holds what a private federation knows between two rounds."""

    bounds: tuple[float, ...]
    """[G]: the length to which each group of a difference is cut in the next round."""
    spent: tuple[Spent, ...] = ()
    """The merges so far; with local noise the rounds in which clients were asked."""

    @classmethod
    def first(cls, mechanism: Mechanism) -> PrivacyState:
        """Make the state before the first round."""
        return cls(tuple(mechanism.bounds.tolist()))

    def after_merge(self, mechanism: Mechanism) -> PrivacyState:
        """Count one merge more."""
        *before, last = self.spent or (Spent(mechanism.multiplier, mechanism.rate, 0),)
        if (last.noise, last.rate) != (mechanism.multiplier, mechanism.rate):
            before, last = [*before, last], Spent(mechanism.multiplier, mechanism.rate, 0)
        return replace(self, spent=(*before, replace(last, merges=last.merges + 1)))


def mechanism_of(scenario: Scenario, shared_blocks: SharedBlocks) -> Mechanism | None:
    """Find how a scenario's clients are protected; None without a budget, or where nothing is shared."""
    if scenario.privacy.epsilon is None or not shared_blocks.size:
        return None
    return Mechanism.of(scenario, shared_blocks)


def noise_stream(scenario: Scenario, seed: int, round: int) -> np.random.Generator | None:
    """Make the stream of a round's noise; None for the operating system's random numbers."""
    return generator(seed, Purpose.PRIVACY, round) if scenario.privacy.source == "seed" else None


@final
class PrivateMerge:
    """Adds up the differences of a round, of which none is kept."""

    def __init__(
        self, mechanism: Mechanism, state: PrivacyState, shared: np.ndarray, settings: Scenario, round: int
    ) -> None:
        """Begin a merge of a round. shared: [S], the shared blocks that its clients begin with."""
        self._mechanism, self._state, self._scenario = mechanism, state, settings
        self._shared = shared.astype(np.float64)
        self._bounds = np.array(state.bounds)
        self._sum = np.zeros_like(self._shared)
        self._within = np.zeros(len(self._bounds))
        """[G]: clients within their bounds, each counted from 1/2."""
        self._stream = noise_stream(settings, settings.seed, round)
        self._weights: dict[str, float] = {}

    def add(self, client: str, trained: Trained, times: float = 1.0) -> None:
        """Add a client's answer; answers come in the order of the clients' names."""
        assert times == 1.0, "all clients have the same weight"
        difference = trained.point.astype(np.float64) - self._shared
        if not self._mechanism.is_local:
            difference, within = cut_to_bounds(difference, self._mechanism.groups, self._bounds)
            self._within += within - 0.5
        self._sum += difference
        self._weights[client] = 1.0

    @property
    def bounds(self) -> np.ndarray:
        """[G]: the bounds of this round."""
        return self._bounds

    def add_sum(self, difference: np.ndarray, within: np.ndarray, clients: Sequence[str]) -> None:
        """Add the sum of differences [S] that clients have cut to their bounds, and how many were within them, [G]."""
        self._sum += difference
        self._within += within - 0.5 * len(clients)
        self._weights |= dict.fromkeys(clients, 1.0)

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of every client that answered: the same for all."""
        return self._weights

    def target(self, shared: Tensor) -> MergeTarget:
        """Add the noise, and return the point that the shared blocks are to move to, and the state after this merge.

        shared: [S], the shared blocks that the merge began with. A merge of no answers is noise alone.
        """
        mechanism, state = self._mechanism, self._state
        if mechanism.is_local:
            mean = self._sum / max(1, len(self._weights))
        else:
            scales = (mechanism.noise_scale * self._bounds)[mechanism.groups]
            mean = (self._sum + scales * standard_noise(len(scales), self._stream)) / mechanism.divisor
            state = replace(state.after_merge(mechanism), bounds=self._next_bounds())
        point = torch.from_numpy((self._shared + mean).astype(np.float32))
        departed: dict[str, tuple[int, ...]] = dict.fromkeys(self._weights, ())
        return MergeTarget(point, self._weights, departed, privacy=state)

    def _next_bounds(self) -> tuple[float, ...]:
        """Move the bounds by how many clients were within them, with noise."""
        mechanism, settings = self._mechanism, self._scenario.privacy
        if np.isinf(mechanism.of_counts):
            return self._state.bounds
        noise = mechanism.count_scale * standard_noise(len(self._bounds), self._stream)
        within = 0.5 + (self._within + noise) / mechanism.divisor
        return tuple(next_bounds(self._bounds, within, settings.quantile, settings.rate).tolist())


def add_local_noise(
    scenario: Scenario, shared_blocks: SharedBlocks, seed: int, start: Start, point: np.ndarray
) -> np.ndarray:
    """Cut what a client has learned to bounds and add its own noise to it, if the scenario says so, [S] -> [S].

    seed: of the client's streams. point: where its training ended.
    """
    mechanism = mechanism_of(scenario, shared_blocks) if scenario.privacy.noise == "local" else None
    if mechanism is None:
        return point
    shared = start.shared.astype(np.float64)
    difference, _ = cut_to_bounds(point - shared, mechanism.groups, mechanism.bounds)
    scales = (mechanism.noise_scale * mechanism.bounds)[mechanism.groups]
    noise = scales * standard_noise(len(scales), noise_stream(scenario, seed, start.round))
    noised: np.ndarray = (shared + difference + noise).astype(np.float32)
    return noised
