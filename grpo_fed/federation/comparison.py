"""A client's choice between its own parameters and the shared ones: it plays the same episodes with both.

With g = (return with the shared ones) - (return with its own), by episode, and with a confidence of 99 % each time,

- the shared ones are *better* if g is above 0, and *no worse* if the client has learned something and g is above minus
  a tenth of that: what it has learned is its mean return less the lowest of any round so far;
- its own ones are *better* if g is below 0.

A language model begins with what it was taught before, so it counts as having learned that, from the lowest reward of
any completion on; the returns of its first rounds mean something already.

If none of this is so, and the client has learned something, it plays as many episodes again, at most four times as
many in all, and then all stays as it was: a client that shares the groups goes on sharing, and one that has left them
stays out. A client that has learned nothing yet cannot tell, so what its updates say decides, and it begins with its
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo_fed.federation.messages import SharingComparison

MARGIN = 0.1
"""The part of what a client has learned that it may lose by sharing."""
CONFIDENCE = 2.33
"""Standard errors of a one-sided test at 99 %."""
LEARNED = 4.0
"""Standard errors by which a client's return has to be above its lowest, so that returns mean something."""
TIMES = 4
"""How many times the scenario's number of episodes a client plays at most."""
APART = 1.5
"""Standard deviations of a round's returns by which the means of rounds have to differ, so that they can be low."""
LOST = 0.25
"""The part of the range of all rounds' means, from below, in which a mean return is low."""
RETURNS = "round.returns"
"""The array of a `ReturnHistory` in a client's state, [4]."""


@dataclass(frozen=True)
class ReturnHistory:
    """What a client remembers of its training returns."""

    lowest: float = math.nan
    """The lowest mean return of a round, or the return of a policy that can do nothing, if that is known and lower; NaN
    before the first round."""
    highest: float = math.nan
    spread: float = 0.0
    """The largest standard deviation of a round's returns."""
    last: float = math.nan
    """The mean return of the last round that had one."""

    @staticmethod
    def read(state: Mapping[str, np.ndarray] | None) -> ReturnHistory:
        """Read the history from a client's state; an empty one without a state."""
        if state is None or RETURNS not in state:
            return ReturnHistory()
        return ReturnHistory(*map(float, state[RETURNS]))

    def arrays(self) -> dict[str, np.ndarray]:
        """Make the array for the client's state."""
        return {RETURNS: np.array([self.lowest, self.highest, self.spread, self.last])}

    def after(self, mean: float, spread: float, floor: float = math.nan) -> ReturnHistory:
        """Add a round with this mean return; NaN if no episode ended.

        floor: the return of a policy that can do nothing, as far as the round told; NaN if it is unknown.
        """
        if not math.isfinite(mean):
            return replace(self, lowest=float(np.fmin(floor, self.lowest)))
        return ReturnHistory(
            float(np.nanmin([mean, floor, self.lowest])),
            max(mean, self.highest) if math.isfinite(self.highest) else mean,
            max(self.spread, spread),
            mean,
        )

    def is_low(self, mean: float) -> bool:
        """Decide whether a mean return says that most of what was learned is lost.

        Nothing is learned yet as long as the means of rounds lie as close together as the returns of one round.
        """
        learned = self.highest - self.lowest
        return learned > APART * self.spread and mean < self.lowest + LOST * learned


def compare_by_playing(
    histories: Mapping[str, ReturnHistory],
    have_left: Collection[str],
    play: Callable[[Sequence[str], bool, int], Sequence[np.ndarray]],
) -> dict[str, SharingComparison]:
    """Let clients play until their comparison is decided, or they have played as much as they may.

    histories: of the clients that compare. have_left: those that have left the groups in question. play: plays a batch
    of episodes with some clients' own parameters, or with the shared ones, and returns each client's returns [E];
    batches are numbered from 0, and the episodes of a batch are the same for both.
    """
    comparisons: dict[str, SharingComparison] = {}
    returns = {client: np.zeros((2, 0)) for client in histories}
    undecided = list(histories)
    for batch in range(TIMES):
        if not undecided:
            break
        for client, own, shared in zip(
            undecided, play(undecided, True, batch), play(undecided, False, batch), strict=True
        ):
            returns[client] = np.concatenate([returns[client], np.stack([own, shared])], 1)
            comparisons[client] = compare_returns(returns[client], histories[client], client in have_left)
        undecided = [client for client in undecided if comparisons[client].is_open]
    return comparisons


def compare_returns(returns: np.ndarray, history: ReturnHistory, has_left: bool) -> SharingComparison:
    """Compare the returns [2, E] of the same episodes with the client's own parameters and with the shared ones.

    has_left: whether the client has left the groups in question, or shares them.
    """
    own, shared = returns
    means = float(own.mean()), float(shared.mean())
    errors = _standard_error(own), _standard_error(shared - own)
    return decide_sharing(means, errors, history.lowest, has_left, len(own) + len(shared))


def decide_sharing(
    means: tuple[float, float], errors: tuple[float, float], lowest: float, has_left: bool, episodes: int
) -> SharingComparison:
    """Decide by the mean returns with own parameters and with the shared ones.

    errors: standard errors of the mean return with own parameters, and of the difference of the two. lowest: the lowest
    mean return of a round, NaN before the first. has_left: whether the groups in question are left or shared now.
    """
    (own, shared), (error_of_own, error) = means, errors
    gain, learned = shared - own, own - lowest
    least, most = gain - CONFIDENCE * error, gain + CONFIDENCE * error
    has_learned = learned > LEARNED * error_of_own
    is_no_worse = least > 0 or (has_learned and least >= -MARGIN * learned)
    is_open = has_learned and not is_no_worse and most >= 0
    return SharingComparison(
        own=own,
        shared=shared,
        error=error,
        learned=learned if math.isfinite(learned) else 0.0,
        episodes=episodes,
        shares=is_no_worse or (is_open and not has_left),
        is_open=is_open,
    )


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))
