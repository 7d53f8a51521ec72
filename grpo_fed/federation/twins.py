"""Whether sharing pays for a client: its training returns beside those of a twin that learns the same task alone.

The twin is a second policy of the client. It begins where the client's first one does, makes as many steps on random
streams of its own, and shares nothing. After each round the client compares the mean returns of the two policies'
training episodes, c and t. What sharing brought it in this round is

    g = (c - t) / (max(c, t) - l),      in [-1, 1],

where l is the lowest mean return of either policy so far: the part of what the better of the two has learned that the
other one lacks. What counts is the mean of g over the rounds. The interval around it is a confidence sequence: with
95 % all of a run's intervals together hold the true means, so a reader may look after each round and stop whenever he
likes. It is the normal mixture of Robbins (Howard et al. 2021, 1810.08240, eq. 14) with an estimated variance
(Waudby-Smith et al. 2021, 2103.06476). With n rounds, V the sum of the squares by which each g differed from the mean
of those before it, and a = 0.05,

    mean(g) +- sqrt((V + 1) log((V + 1) / a^2)) / n.

Sharing *costs* the client if the whole interval is below -MARGIN, and *pays* if it is above MARGIN. The margin is there
for the luck of learning: two policies that learn alike from different draws are really unlike for a while.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Self

import numpy as np

from grpo_fed.federation.learners import RoundReports
from grpo_fed.rl.records import TrainingReport
from grpo_fed.runs.metrics import TWIN_GAIN, TWIN_GAIN_HIGH, TWIN_GAIN_LOW, TWIN_RETURN, TWIN_SINCE, TWIN_VERDICT

ERROR = 0.05
"""The probability that some interval of a run does not hold the true mean, at most."""
MARGIN = 0.2
"""The part of what was learned that sharing must bring or cost. `python -m benchmarks.verdicts` says how often policies
that learn alike would be told apart."""
COMPARED = "round.twin"
"""The array of a `TwinComparison` in a client's state, [6]."""


@dataclass(frozen=True)
class TwinComparison:
    """What a client remembers of its comparisons with its twin."""

    lowest: float = math.inf
    """The lowest mean return of a round of either policy, or the return of a policy that can do nothing if that is
    known; infinite before the first round."""
    rounds: int = 0
    """The rounds that were compared: those after the first in which episodes of both policies finished."""
    gain: float = 0.0
    """Sum of the rounds' g."""
    scatter: float = 0.0
    """V: sum of the squares by which each g differed from the mean before it."""
    verdict: int = 0
    """1 if sharing pays, -1 if it costs, 0 if that is open."""
    since: int = 0
    """The round since which the verdict has held; 0 while it is open."""

    @classmethod
    def read(cls, state: Mapping[str, np.ndarray] | None) -> Self:
        """Read the comparison from a client's state; an empty one without a state."""
        if state is None or COMPARED not in state:
            return cls()
        lowest, rounds, gain, scatter, verdict, since = state[COMPARED].tolist()
        return cls(lowest, int(rounds), gain, scatter, int(verdict), int(since))

    def arrays(self) -> dict[str, np.ndarray]:
        """Make the array for the client's state."""
        return {COMPARED: np.array(astuple(self), np.float64)}

    @property
    def mean(self) -> float:
        """The mean of g; NaN before the first comparison."""
        return self.gain / self.rounds if self.rounds else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval around the mean, within [-1, 1]."""
        if not self.rounds:
            return -1.0, 1.0
        total = self.scatter + 1
        half = math.sqrt(total * math.log(total / ERROR**2)) / self.rounds
        return max(self.mean - half, -1.0), min(self.mean + half, 1.0)

    def after(self, round: int, own: TrainingReport, twin: TrainingReport) -> Self:
        """Add a round's training episodes, of the client's own policy and of its twin."""
        returns = own.mean_return, twin.mean_return
        if not all(map(math.isfinite, returns)):
            return self
        lowest = float(np.nanmin([self.lowest, *returns, own.floor]))
        if math.isinf(self.lowest):
            return replace(self, lowest=lowest)
        learned = max(returns) - lowest
        gain = (returns[0] - returns[1]) / learned if learned > 0 else 0.0
        before = self.mean if self.rounds else 0.0
        compared = replace(
            self,
            lowest=lowest,
            rounds=self.rounds + 1,
            gain=self.gain + gain,
            scatter=self.scatter + (gain - before) ** 2,
        )
        low, high = compared.interval
        verdict = int(low > MARGIN) - int(high < -MARGIN)
        since = self.since if verdict == self.verdict else round
        return replace(compared, verdict=verdict, since=since if verdict else 0)

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
