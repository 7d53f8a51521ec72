"""What is in a masked vector, [N] uint32: the difference [S], numbers that are counted, and how many were cut.

Counted for each group [G] are, with a privacy budget, the clients that are within the group's bound, and with a penalty
towards zero those that have all of the group at zero; else nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import numpy as np
import torch

from grpo_fed.aggregation.merge.zeros import zero_groups
from grpo_fed.aggregation.privacy.clipping import cut_to_bounds
from grpo_fed.aggregation.secure.fixed_point import from_words, to_words
from grpo_fed.federation.round_merge import penalised_groups
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario


@final
@dataclass(frozen=True, eq=False)
class MaskedSum:
    """The sum of what clients sent, without masks."""

    difference: np.ndarray
    """[S] float64."""
    counts: np.ndarray
    """[G] or [0]: how many clients had what is counted."""
    cut: int
    """How many parameters of all clients were cut to `privacy.reach`."""


@final
@dataclass(frozen=True, eq=False)
class MaskedVectors:
    """Makes the vectors of a federation's clients, and reads their sum."""

    scenario: Scenario
    shared_blocks: SharedBlocks
    counts: int
    """G if something is counted by group, else 0."""

    @classmethod
    def of(cls, scenario: Scenario, shared_blocks: SharedBlocks) -> Self:
        """Find out what vectors hold."""
        is_counted = scenario.privacy.epsilon is not None or bool(penalised_groups(scenario, shared_blocks).any())
        return cls(scenario, shared_blocks, len(shared_blocks.groups.names) if is_counted else 0)

    @property
    def size(self) -> int:
        """N."""
        return self.shared_blocks.size + self.counts + 1

    def write(self, shared: np.ndarray, point: np.ndarray, bounds: tuple[float, ...], clients: int) -> np.ndarray:
        """Make a client's vector [N] uint32 of where it began and arrived, [S]; ValueError if that is not finite."""
        groups = self.shared_blocks.groups
        difference = point.astype(np.float64) - shared
        counted = np.zeros(self.counts, bool)
        if bounds:
            difference, counted = cut_to_bounds(difference, groups.ids.numpy(), np.array(bounds))
        elif self.counts:
            counted = zero_groups(torch.from_numpy(point.copy()), groups).numpy()
        words, cut = to_words(difference, self.scenario.privacy.reach, clients)
        return np.concatenate([words, counted.astype(np.uint32), np.array([cut], np.uint32)])

    def read(self, total: np.ndarray, clients: int) -> MaskedSum:
        """Read the sum [N] uint32 of vectors that were made for so many clients."""
        size = self.shared_blocks.size
        counts = total[size : size + self.counts].astype(np.float64)
        return MaskedSum(from_words(total[:size], self.scenario.privacy.reach, clients), counts, int(total[-1]))
