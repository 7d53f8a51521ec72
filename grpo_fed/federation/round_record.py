"""A round as a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_fed.federation.messages import Trained
from grpo_fed.federation.server_step import ServerStep


@dataclass(frozen=True)
class RoundOutcome:
    """What a round came to, but for what the clients play after it."""

    round: int
    seconds: float = 0.0
    replies: Mapping[str, Trained] = field(default_factory=dict)
    """Without their points, which are merged."""
    step: ServerStep | None = None
    """None where there was no merge."""
    last_kl: Mapping[str, float] = field(default_factory=dict)
    """KL of the last round's step, as clients know it now."""
    notes: tuple[str, ...] = ()
