"""TrainedRound: what clients have learned in a round, as it arrives."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from grpo_fed.federation.buffer import BufferedAnswers
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.server import Merge

MERGED = np.zeros(0, np.float32)
"""Replaces a vector that has been merged, so that its memory is freed."""


@dataclass
class TrainedRound:
    """Holds what clients have learned in a round."""

    merge: Merge
    expected: int
    """How many answers there should be."""
    replies: dict[str, Trained] = field(default_factory=dict)
    """The answers, without the vectors that are in the merge."""
    length: float = 1.0
    """The part of the way to the merge that the shared blocks may go."""
    batch: BufferedAnswers | None = None
    """How the answers came, if the server did not wait for all."""
    problem: str | None = None
    """Why nothing can be merged; None if something can."""
    began: float = field(default_factory=time.perf_counter)
    """When clients began, or the server began to wait for them."""

    def add(self, client: str, answer: Trained, weight: float = 1.0) -> None:
        """Add a client's answer to the merge, and keep the rest of it."""
        self.merge.add(client, answer, weight)
        self.replies[client] = replace(answer, point=MERGED, fisher=None, difference=None, masked=None)
