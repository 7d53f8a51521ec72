"""Records of the room: what an update learns from, and what a learner reports.

K clients of a learner, T steps, N copies of a client's environment, D observation entries, A action entries, M
distribution parameters, B steps of a minibatch, E episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The steps that K clients collected between two updates."""

    observations: Tensor
    """[K, T, N, D]: as the policy saw them."""
    actions: Tensor
    """[K, T, N, A]: as sampled, before clipping or squashing; a discrete action is a float that holds an integer."""
    log_probs: Tensor
    """[K, T, N]: log-probabilities of the actions under the policy that took them."""
    distribution: Tensor
    """[K, T, N, M]: action distributions of that policy."""
    values: Tensor
    """[K, T, N]: values of the observations; 0 where there is no critic."""
    next_values: Tensor
    """[K, T, N]: values of the observations that the actions led to; 0 where terminated or without a critic."""
    rewards: Tensor
    """[K, T, N]: normalised if the scenario says so."""
    ends: Tensor
    """[K, T, N] bool: terminated or truncated; no advantage flows back across an end."""
    valid: Tensor
    """[K, T, N] bool: False for steps that must not be learned from."""
    episodes: Tensor
    """[K, T, N] int64: which of the client's episodes in this batch a step belongs to, from 0."""
    costs: Tensor | None = None
    """[K, T, N]: what the actions cost; None where costs have no limit."""
    cost_values: Tensor | None = None
    """[K, T, N]: the cost critic's values of the observations; None without one."""
    next_cost_values: Tensor | None = None
    """[K, T, N]: its values of the observations that the actions led to; 0 where terminated."""


@dataclass(frozen=True)
class Minibatch:
    """A part of a batch with everything that the objective needs."""

    observations: Tensor
    """[K, B, D]; of a policy with memory, W sequences of T steps, [K, W, T, D + H + 1] with W * T = B."""
    actions: Tensor
    """[K, B, A]."""
    log_probs: Tensor
    """[K, B]: log-probabilities under the policy that acted."""
    distribution: Tensor
    """[K, B, M]: distributions that the KL is measured from."""
    advantages: Tensor
    """[K, B]."""
    returns: Tensor
    """[K, B]: targets of the critic."""
    values: Tensor
    """[K, B]: the critic's values when the batch was collected."""
    weights: Tensor
    """[K, B]: weight of each step in the mean; 0 for steps that must not be learned from."""
    episodes: Tensor | None = None
    """[K, B] int64: the episode that a step belongs to; None where the objective does not need it."""


@dataclass(frozen=True)
class Episode:
    """A finished episode, in raw rewards."""

    score: float
    """Sum of the episode's rewards."""
    length: int
    """Number of its steps."""
    terminated: bool
    """True where the task ended it, False where it was truncated."""
    cost: float = math.nan
    """Sum of what its steps cost; NaN where no cost is read."""
    level: tuple[float, ...] = ()
    """[Q]: the level that it was played at; empty for a task without levels."""


@dataclass(frozen=True)
class TrainingReport:
    """What one client did in one call of `Learner.train`."""

    client: str
    steps: int
    """Environment steps that were learned from."""
    episodes: tuple[Episode, ...]
    """The episodes that finished."""
    losses: Mapping[str, float]
    """Means over the updates, by the name of the loss."""
    penalty: Mapping[str, float] = field(default_factory=dict)
    """The group penalty at the end, by the metrics' keys; empty without one."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Metrics that only some kinds of tasks have, by their keys."""
    tokens: int = 0
    """Tokens that a language model wrote."""
    floor: float = math.nan
    """The return of a policy that can do nothing, where the task tells; NaN where it does not."""

    @property
    def mean_return(self) -> float:
        """Mean return of the finished episodes; NaN where none has finished."""
        return _mean([episode.score for episode in self.episodes])

    @property
    def mean_cost(self) -> float:
        """Mean cost of the finished episodes; NaN where none has finished, or no cost is read."""
        return _mean([episode.cost for episode in self.episodes])

    @property
    def spread(self) -> float:
        """Standard deviation of the returns; 0 where no episode has finished."""
        return float(np.std([episode.score for episode in self.episodes])) if self.episodes else 0.0

    def metrics(self, seconds: float | None = None) -> dict[str, float]:
        """The metrics that a client reports of its training, by their keys; what is not finite is left out.

        seconds: how long the call took, where that is to be reported.
        """
        metrics = {
            "charts/episodic_return": self.mean_return,
            "charts/episodic_cost": self.mean_cost,
            "charts/episodic_length": _mean([episode.length for episode in self.episodes]),
            "charts/seconds": math.nan if seconds is None else seconds,
            "charts/tokens_per_second": self.tokens / seconds if self.tokens and seconds else math.nan,
            **{f"losses/{name}": value for name, value in self.losses.items()},
            **self.penalty,
            **self.more,
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Evaluation:
    """Episodes that a client played without learning."""

    client: str
    deterministic: bool
    """True for the likeliest actions, False for sampled ones."""
    scores: np.ndarray
    """[E]: sum of each episode's raw rewards."""
    lengths: np.ndarray
    """[E]: number of each episode's steps."""
    costs: np.ndarray | None = None
    """[E]: sum of what each episode's steps cost; None where no cost is read."""

    @property
    def score(self) -> float:
        """Mean return."""
        return float(self.scores.mean())

    @property
    def cost(self) -> float | None:
        """Mean cost; None where no cost is read."""
        return None if self.costs is None else float(self.costs.mean())


@dataclass(frozen=True)
class Example:
    """A prompt that a client answered before it learned and after, to be shown to people."""

    prompt: str
    before: str
    """The completion of the first policy."""
    before_reward: float
    after: str
    """The completion of the last policy."""
    after_reward: float


def _mean(values: Sequence[float]) -> float:
    """The mean; NaN of no values."""
    return float(np.mean(values)) if values else math.nan
