"""Running normalisers of observations and rewards for K stacked clients, each with moments of its own.

K clients, N copies of the task, D observation entries. All moments are float64; what a policy sees is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = dict[str, np.ndarray]
"""All that one client's normaliser needs to go on, as arrays by name."""

EPSILON = 1e-8
"""Added to a variance before its root is taken."""
PRIOR = 1e-4
"""Weight, in samples, of the mean 0 and variance 1 at the beginning; stable-baselines3's."""


@final
class RunningMoments:
    """Mean and variance of all samples of each client."""

    def __init__(self, clients: int, size: int, prior: float = PRIOR) -> None:
        self.count: Array = np.full(clients, prior)
        """[K]: number of samples, and the prior."""
        self.mean: Array = np.zeros((clients, size))
        """[K, D]."""
        self.variance: Array = np.ones((clients, size))
        """[K, D]: of the whole population, not the unbiased estimate."""

    def update(self, batch: np.ndarray) -> None:
        """Add [K, n, D] samples, by Chan, Golub and LeVeque (1983), equation (2.1)."""
        merged = _merged(self.count, self.mean, self.variance, batch)
        self.count, self.mean, self.variance = merged

    def update_one(self, client: int, batch: np.ndarray) -> None:
        """Add [n, D] samples of one client."""
        if len(batch) == 0:
            return
        row = slice(client, client + 1)
        merged = _merged(self.count[row], self.mean[row], self.variance[row], batch[None])
        self.count[row], self.mean[row], self.variance[row] = merged

    def state(self, client: int) -> State:
        """Copies of one client's moments."""
        mean, variance = self.mean[client].copy(), self.variance[client].copy()
        return {"count": np.array(self.count[client]), "mean": mean, "variance": variance}

    def load(self, client: int, state: Mapping[str, np.ndarray]) -> None:
        """Set one client's moments to a `state`; ValueError if it does not fit, and nothing is changed then."""
        _check(state, self.state(client))
        if not (state["count"] >= 0 and (state["variance"] >= 0).all()):
            raise ValueError("moments: count and variance must not be negative; this is no state of a normaliser")
        self.count[client] = state["count"]
        self.mean[client] = state["mean"]
        self.variance[client] = state["variance"]


def _merged(count: Array, mean: Array, variance: Array, batch: np.ndarray) -> tuple[Array, Array, Array]:
    """Add samples [K, n, D] to counts [K], means [K, D] and variances [K, D]."""
    samples = batch.astype(np.float64)
    fresh = samples.shape[1]
    fresh_mean = np.add.reduce(samples, 1)
    fresh_mean /= fresh
    samples -= fresh_mean[:, None]
    samples *= samples
    total = count + fresh
    old = (count / total)[:, None]
    new = 1.0 - old
    shift = fresh_mean - mean
    spread = np.add.reduce(samples, 1)
    spread *= new / fresh
    return total, mean + shift * new, (variance + shift * shift * new) * old + spread


@final
class ObservationNormaliser:
    """Shifts and scales every entry of the observations to mean 0 and variance 1, within +-clip."""

    def __init__(self, clients: int, size: int, clip: float) -> None:
        self.moments = RunningMoments(clients, size)
        self.clip = clip

    def update(self, observations: np.ndarray) -> None:
        """Add raw observations [K, N, D] to the moments."""
        self.moments.update(observations)

    def update_one(self, client: int, observations: np.ndarray) -> None:
        """Add one client's raw observations [n, D] to its moments."""
        self.moments.update_one(client, observations)

    def apply(self, observations: np.ndarray) -> np.ndarray:
        """Normalise raw observations [K, ..., D], float32; the moments stay."""
        mean, variance = self.moments.mean, self.moments.variance
        if observations.ndim != 2:
            shape = (len(mean), *[1] * (observations.ndim - 2), -1)
            mean, variance = mean.reshape(shape), variance.reshape(shape)
        return _scaled(observations - mean, variance, self.clip)

    def apply_one(self, client: int, observations: np.ndarray) -> np.ndarray:
        """Normalise one client's raw observations [..., D], float32; the moments stay."""
        return _scaled(observations - self.moments.mean[client], self.moments.variance[client], self.clip)

    def undo(self, observations: np.ndarray) -> np.ndarray:
        """The inverse of `apply`, [K, ..., D] float32, with the same moments and for entries that were not clipped."""
        shape = (len(self.moments.mean), *[1] * (observations.ndim - 2), -1)
        scale = np.sqrt(self.moments.variance + EPSILON).reshape(shape)
        return (observations * scale + self.moments.mean.reshape(shape)).astype(np.float32)

    def state(self, client: int) -> State:
        """Copies of one client's moments."""
        return self.moments.state(client)

    def load(self, client: int, state: Mapping[str, np.ndarray]) -> None:
        """Set one client's moments to a `state`."""
        self.moments.load(client, state)


@final
class RewardNormaliser:
    """Divides rewards by the running standard deviation of the discounted return, within +-clip.

    The return of a copy is the sum of its episode's rewards so far, each discounted by its age, as in
    stable-baselines3's VecNormalize. The mean is not subtracted, so no reward changes its sign.
    """

    def __init__(self, clients: int, copies: int, gamma: float, clip: float) -> None:
        self.moments = RunningMoments(clients, 1)
        self.gamma = gamma
        self.clip = clip
        self.returns: Array = np.zeros((clients, copies))
        """[K, N]: returns of the running episodes."""

    def __call__(self, rewards: np.ndarray, ends: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """Add a step's raw rewards [K, N] to the moments and normalise them, float32.

        ends: [K, N] bool, where an episode ends: the copy's return begins at 0 again.
        valid: [K, N] bool; other rewards do not count and become 0. None if all are valid.
        """
        if valid is not None and not valid.all():
            return self._normalise_valid(rewards, ends, valid)
        self.returns *= self.gamma
        self.returns += rewards
        self.moments.update(self.returns[:, :, None])
        self.returns[ends] = 0.0
        return self.apply(rewards)

    def _normalise_valid(self, rewards: np.ndarray, ends: np.ndarray, valid: np.ndarray) -> np.ndarray:
        self.returns = np.where(valid, self.returns * self.gamma + rewards, self.returns)
        for client, is_valid in enumerate(valid):
            self.moments.update_one(client, self.returns[client, is_valid, None])
        self.returns[ends] = 0.0
        return np.where(valid, self.apply(rewards), np.float32(0.0))

    def whole_episodes(self, rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Normalise the raw rewards [K, T, N] of one episode in each copy, float32, then add them to the moments.

        valid: [K, T, N] bool; other rewards do not count and become 0.
        """
        normalised = np.where(valid, self.apply(rewards), np.float32(0.0))
        returns = rewards.astype(np.float64)
        for t in range(1, returns.shape[1]):
            returns[:, t] += self.gamma * returns[:, t - 1]
        for client, is_valid in enumerate(valid):
            self.moments.update_one(client, returns[client, is_valid, None])
        return normalised

    def apply(self, rewards: np.ndarray) -> np.ndarray:
        """Normalise raw rewards [K, ...], float32; the moments stay."""
        return _scaled(rewards, self.moments.variance.reshape(-1, *[1] * (rewards.ndim - 1)), self.clip)

    def state(self, client: int) -> State:
        """Copies of one client's moments and running returns."""
        return {**self.moments.state(client), "returns": self.returns[client].copy()}

    def load(self, client: int, state: Mapping[str, np.ndarray]) -> None:
        """Set one client's moments and running returns to a `state`."""
        _check(state, self.state(client))
        self.moments.load(client, {name: value for name, value in state.items() if name != "returns"})
        self.returns[client] = state["returns"]


def _scaled(values: np.ndarray, variance: Array, clip: float) -> np.ndarray:
    """Values divided by the square root of variance + EPSILON, within +-clip, float32."""
    scaled = values / np.sqrt(variance + EPSILON)
    # np.clip takes three times as long on arrays as small as a step's
    np.minimum(np.maximum(scaled, -clip, out=scaled), clip, out=scaled)
    return scaled.astype(np.float32)


def _check(state: Mapping[str, np.ndarray], expected: State) -> None:
    """ValueError unless `state` has exactly the expected names and shapes, and finite numbers."""
    if set(state) != set(expected):
        raise ValueError(f"normaliser: its state has {sorted(expected)}, not {sorted(state)}")
    for name, value in expected.items():
        given = np.asarray(state[name])
        if given.shape != value.shape or not np.isfinite(given).all():
            raise ValueError(f"normaliser: {name} must be finite and of shape {value.shape}; it is {given.shape}")
