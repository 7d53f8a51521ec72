"""A round's merge from the sum of what clients sent, of which the server knows no single part.

Answers are added up as they come, masked; `secure_round.py` takes the masks off. The mean follows, with the noise of a
privacy budget, and with groups at zero where most clients have them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.aggregation.merge.zeros import set_to_zero
from grpo_fed.federation.masked_vectors import MaskedVectors
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.private_merge import PrivateMerge
from grpo_fed.federation.round_merge import MergeTarget, penalised_groups
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario


@final
class SecureMerge:
    """Adds up the masked vectors of a round."""

    def __init__(
        self, scenario: Scenario, shared_blocks: SharedBlocks, shared: np.ndarray, private: PrivateMerge | None
    ) -> None:
        """Begin a merge.

        shared: [S], as the round begins. private: adds the noise of a privacy budget; None without one.
        """
        self._vectors = MaskedVectors.of(scenario, shared_blocks)
        self._penalised, self._groups = penalised_groups(scenario, shared_blocks), shared_blocks.groups
        self._shared, self._private = shared.astype(np.float64), private
        self._total = np.zeros(self._vectors.size, np.uint32)
        self._weights: dict[str, float] = {}
        self._point: Tensor | None = None

    @property
    def bounds(self) -> tuple[float, ...]:
        """What clients cut their differences to, [G]; empty without a privacy budget."""
        return () if self._private is None else tuple(self._private.bounds.tolist())

    def add(self, client: str, trained: Trained, times: float = 1.0) -> None:
        """Add a client's masked vector."""
        assert times == 1.0, "all clients have the same weight"
        assert trained.masked is not None, "with secure aggregation clients mask what they send"
        self._total += trained.masked
        self._weights[client] = 1.0

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of every client that answered: the same for all."""
        return self._weights

    @property
    def masked(self) -> np.ndarray:
        """The sum of all masked vectors so far, [N] uint32."""
        return self._total

    def finish(self, plain: np.ndarray, clients: int) -> list[str]:
        """Take in the sum [N] uint32 without masks; return messages for a person.

        clients: the number for which the vectors were made.
        """
        found, count = self._vectors.read(plain, clients), len(self._weights)
        notes = []
        if found.cut:
            reach = self._vectors.scenario.privacy.reach
            notes.append(
                f"secure aggregation: {found.cut} parameters of the clients' differences changed by more than"
                f" privacy.reach = {reach:g} and were cut; give more"
            )
        if self._private is not None:
            self._private.add_sum(found.difference, found.counts, tuple(self._weights))
            return notes
        self._point = torch.from_numpy((self._shared + found.difference / count).astype(np.float32))
        if self._vectors.counts:
            zeros = torch.from_numpy(2 * found.counts > count)
            self._point = set_to_zero(self._point, zeros & self._penalised, self._groups)
        return notes

    def target(self, shared: Tensor) -> MergeTarget:
        """Return the point that the shared blocks are to move to, after `finish`. shared: [S], as the round began."""
        if self._private is not None:
            return self._private.target(shared)
        assert self._point is not None, "a merge without a sum is left out"
        departed: dict[str, tuple[int, ...]] = dict.fromkeys(self._weights, ())
        return MergeTarget(self._point, self._weights, departed)
