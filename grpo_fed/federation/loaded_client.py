"""A client that was given an instruction: where it starts, and what it remembers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from grpo_fed.federation.comparison import ReturnHistory
from grpo_fed.federation.messages import Start
from grpo_fed.federation.state_store import Arrays, StoredState

ROUND_SHARED = "round.shared"
"""The array in a client's state with the shared blocks [S] that the round began with."""


@dataclass(frozen=True, eq=False)
class LoadedClient:
    """A client that was given an instruction, with what it remembers."""

    name: str
    start: Start
    stored: StoredState | None
    """The latest state that it remembers; None before its first round."""

    @property
    def state(self) -> Arrays | None:
        """What it remembers, by name."""
        return None if self.stored is None else self.stored.arrays

    @property
    def last_round(self) -> int:
        """The last round that it remembers; 0 if there is none."""
        return 0 if self.stored is None else self.stored.round

    def remembers(self, round: int) -> bool:
        """Whether this is the last round that it remembers."""
        return self.stored is not None and self.stored.round == round

    @property
    def remembered(self) -> Arrays:
        """What it remembers, of a client that remembers something."""
        assert self.state is not None, f"{self.name} has a state"
        return self.state

    def gain(self, mean_return: float) -> float:
        """A round's mean return less that of the round before; 0 where one of the two has no finished episode."""
        if not self.remembers(self.start.round - 1):
            return 0.0
        gain = mean_return - ReturnHistory.read(self.state).last
        return gain if math.isfinite(gain) else 0.0

    def with_own_groups(self, groups: Sequence[int], own: bool) -> LoadedClient:
        """Return the client as it begins with its own parameters in some groups, or with the shared ones."""
        departed = {*self.start.departed, *groups} if own else {*self.start.departed} - {*groups}
        return replace(self, start=replace(self.start, departed=tuple(sorted(departed))))
