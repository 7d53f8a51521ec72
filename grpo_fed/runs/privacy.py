"""What a run has spent of its privacy budget, in its records and its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_fed.runs.metrics import PRIVACY_BOUND, PRIVACY_EPSILON


@dataclass(frozen=True)
class PrivacyCost:
    """Holds what the merges so far cost."""

    epsilon: float
    delta: float
    budget: float
    """Epsilon at which the run ends."""
    merges: int
    """Merges that count; with local noise rounds in which clients were asked."""
    noise: str
    """Who adds the noise: `central` or `local`."""
    price: float
    """The expected length of the noise in the mean, by that of a difference at its bounds."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """By block, the length to which a client's difference will be cut in the next round."""
    is_spent: bool = False
    """Whether one merge more would exceed the budget."""

    @property
    def metrics(self) -> dict[str, float]:
        """Make the metrics of a round: epsilon, and the bound of each block."""
        return {PRIVACY_EPSILON: self.epsilon, **{f"{PRIVACY_BOUND}{name}": each for name, each in self.bounds.items()}}

    @property
    def line(self) -> str:
        """The cost in a sentence."""
        who = "towards whoever sees the shared blocks" if self.noise == "central" else "towards the server too"
        return (
            f"epsilon {self.epsilon:.3g} of {self.budget:g} with delta {self.delta:g}, {who}, after {self.merges}"
            f" noised merge{'s' if self.merges != 1 else ''}"
        )


def explain_spent_budget(cost: PrivacyCost | None) -> str | None:
    """Explain why no other merge is made; None if one may be."""
    if cost is None or not cost.is_spent:
        return None
    return (
        f"the privacy budget is spent: epsilon is {cost.epsilon:.3g} after {cost.merges} merges, and one more would"
        f" exceed privacy.epsilon = {cost.budget:g}"
    )
