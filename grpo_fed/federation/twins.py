"""Whether sharing pays for a client: its training returns beside those of a twin that learns the same task alone.

The twin is a second policy of the client. It begins where the client's first one does, makes as many steps on random
streams of its own, and shares nothing. After each round the client compares the mean returns of the two policies'
training episodes, c and t. What sharing brought it in this round is

    g = (c - t) / (max(c, t) - l),      in [-1, 1],

where l is the lowest mean return of either policy so far: the part of what the better of the two has learned that the
other one lacks. The first round gives l alone.

Whoever bets against "sharing costs no more than m" stakes a fraction of his capital in each round and wins the more,
the further g is below -m. If the claim is true he can hope for no gain, whatever was before, and with a probability of
95 % his capital never reaches 20 times the first, in no round of the run (Ville). So a capital of 20 refutes the claim,
and one may look after every round and stop whenever one likes (Waudby-Smith and Ramdas, 2010.09686, section 4). With
x = g + m, which is at most 1 + m, and the stakes f = 1/4, 1/2, 3/4 and 19/20 with equal shares of the first capital,

    capital = mean over f of the product over the rounds of (1 - f x / (1 + m)).

Sharing *costs* a client where the claim with m = MARGIN is refuted, and it *pays* where the same claim about the twin
is. The margin is there for the luck of learning: two policies that learn alike from different draws are really unlike
for a while. The ends of the interval that is shown are the values of -m that are just not refuted, from either side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from grpo_fed.federation.learners import RoundReports
from grpo_fed.rl.records import TrainingReport
from grpo_fed.runs.metrics import TWIN_GAIN, TWIN_GAIN_HIGH, TWIN_GAIN_LOW, TWIN_RETURN, TWIN_SINCE, TWIN_VERDICT

ERROR = 0.05
"""The probability that a true claim is ever refuted, at most."""
MARGIN = 0.1
"""The part of what was learned that sharing must bring or cost. `python -m benchmarks.verdicts` says how often policies
that learn alike are told apart."""
STAKES = np.array([0.25, 0.5, 0.75, 0.95])
COMPARED = "round.twin"
"""The array of a `TwinComparison` in a client's state, [3 + n]."""


@dataclass(frozen=True)
class TwinComparison:
    """What a client remembers of its comparisons with its twin."""

    lowest: float = math.inf
    """The lowest mean return of a round of either policy, or the return of a policy that can do nothing if that is
    known; infinite before the first round."""
    verdict: int = 0
    """1 if sharing pays, -1 if it costs, 0 if that is open."""
    since: int = 0
    """The round since which the verdict has held; 0 while it is open."""
    gains: tuple[float, ...] = ()
    """[n]: the g of the rounds that were compared: those after the first in which both policies finished an episode."""

    @classmethod
    def read(cls, state: Mapping[str, np.ndarray] | None) -> Self:
        """Read the comparison from a client's state; an empty one without a state."""
        if state is None or COMPARED not in state:
            return cls()
        lowest, verdict, since, *gains = state[COMPARED].tolist()
        return cls(lowest, int(verdict), int(since), tuple(gains))

    def arrays(self) -> dict[str, np.ndarray]:
        """Make the array for the client's state."""
        return {COMPARED: np.array([self.lowest, self.verdict, self.since, *self.gains], np.float64)}

    @property
    def mean(self) -> float:
        """The mean of g; NaN before the first comparison."""
        return float(np.mean(self.gains)) if self.gains else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval around the mean; each holds at 95 % in all rounds together."""
        gains = np.array(self.gains)
        return -_highest_mean(-gains), _highest_mean(gains)

    def after(self, round: int, own: TrainingReport, twin: TrainingReport) -> Self:
        """Add a round's training episodes, of the client's own policy and of its twin."""
        returns = own.mean_return, twin.mean_return
        if not all(map(math.isfinite, returns)):
            return self
        lowest = float(np.nanmin([self.lowest, *returns, own.floor]))
        if math.isinf(self.lowest):
            return type(self)(lowest)
        learned = max(returns) - lowest
        gains = (*self.gains, (returns[0] - returns[1]) / learned if learned > 0 else 0.0)
        values, limit = np.array(gains), -math.log(ERROR)
        verdict = int(log_capital(-values, -MARGIN) >= limit) - int(log_capital(values, -MARGIN) >= limit)
        since = self.since if verdict == self.verdict else round
        return type(self)(lowest, verdict, since if verdict else 0, gains)

    def metrics(self, twin: TrainingReport) -> dict[str, float]:
        """Make the metrics of a round in which the twin was trained; without what is not known yet."""
        low, high = self.interval
        metrics = {
            TWIN_RETURN: twin.mean_return,
            TWIN_GAIN: self.mean,
            TWIN_GAIN_LOW: low,
            TWIN_GAIN_HIGH: high,
            TWIN_VERDICT: float(self.verdict),
            TWIN_SINCE: float(self.since),
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


def log_capital(gains: np.ndarray, mean: float) -> float:
    """Compute the logarithm of the capital of who bets that gains [n], in [-1, 1], have a lower mean than this one."""
    wins = np.log1p(-STAKES[:, None] * (gains - mean) / (1 - mean)).sum(axis=1)
    return float(np.logaddexp.reduce(wins) - math.log(len(STAKES)))


def _highest_mean(gains: np.ndarray) -> float:
    """Find the highest mean that the gains [n] do not refute: the capital grows with the mean, so by bisection."""
    low, high = -1.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if log_capital(gains, middle) >= -math.log(ERROR) else (middle, high)
    return high


@dataclass(frozen=True)
class TwinRound:
    """What the comparison gives in a round; nothing without a twin."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """For the client's state."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the client reports."""


def compare_with_twin(state: Mapping[str, np.ndarray] | None, round: int, reports: RoundReports) -> TwinRound:
    """Add a round to the comparison in a client's state, and report on it."""
    if reports.twin is None:
        return TwinRound()
    compared = TwinComparison.read(state).after(round, reports.evaluated, reports.twin)
    return TwinRound(compared.arrays(), compared.metrics(reports.twin))
