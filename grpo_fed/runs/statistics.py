"""Statistics of few seeds: interquartile mean, probability of improvement, bootstrap intervals.

Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv 2108.13264. Scores are [S, T]: seed, task;
a single task is [S, 1]. The statistics take leading axes too, so that all resamples are one call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Holds a statistic of the scores and its 95 % bootstrap interval."""

    value: float
    """The statistic of the scores themselves."""
    low: float
    """The lower end of the interval."""
    high: float
    """The upper end of the interval."""


def estimate(
    statistic: Callable[..., np.ndarray],
    *scores: np.ndarray,
    generator: np.random.Generator,
    resamples: int = 2_000,
    whole_seeds: bool = False,
) -> Estimate:
    """Compute a statistic of one or more score arrays, each [S, T], and its percentile interval.

    estimate(interquartile_mean, ours, generator=np.random.default_rng(0))
    estimate(probability_of_improvement, ours, peers, generator=np.random.default_rng(0))

    whole_seeds: resample whole seeds, not each task's seeds by themselves, for tasks that are learned in one run and so
    are not independent.
    """
    for array in scores:
        _check_scores(array)
    draw = whole_resamples if whole_seeds else stratified_resamples
    resampled = statistic(*(draw(array, generator, resamples) for array in scores))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(statistic(*scores)), float(low), float(high))


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Compute the mean of the middle half of all seeds and tasks together, [..., S, T] -> [...]."""
    pooled = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = pooled.shape[-1] // 4
    return np.asarray(pooled[..., cut : pooled.shape[-1] - cut].mean(axis=-1))


def iqm(scores: np.ndarray) -> float:
    """Compute the interquartile mean of the scores [K] of one run's clients (2108.13264)."""
    return float(interquartile_mean(scores[:, None]))


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Estimate the probability that a seed of ours beats one of theirs on the same task.

    [..., S, T] and [..., R, T] -> [...]. A tie counts half; all tasks have the same weight.
    """
    difference = ours[..., :, None, :] - theirs[..., None, :, :]
    wins = (difference > 0) + 0.5 * (difference == 0)
    return np.asarray(wins.mean(axis=(-3, -2, -1)))


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Compute which part of all seeds and tasks has a score above each threshold, [..., S, T] and [H] -> [..., H].

    Every task has the same weight. This is the run-score distribution of the paper.
    """
    above = scores[..., None] > thresholds
    return np.asarray(above.mean(axis=(-3, -2)))


def stratified_resamples(scores: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Sample seeds with replacement for each task on its own, [S, T] -> [resamples, S, T]."""
    rows = generator.integers(len(scores), size=(resamples, *scores.shape))
    return np.take_along_axis(scores[None], rows, axis=1)


def whole_resamples(scores: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Sample seeds with replacement, each with all its tasks, [S, T] -> [resamples, S, T]."""
    return scores[generator.integers(len(scores), size=(resamples, len(scores)))]


def _check_scores(scores: np.ndarray) -> None:
    """ValueError for scores that are not a finite [S, T]."""
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores of shape {scores.shape}: expected [seeds, tasks]; one task is scores[:, None]")
    # trimming would drop infinities and NaN silently
    if not np.isfinite(scores).all():
        raise ValueError(f"scores hold {scores[~np.isfinite(scores)][0]}: leave the run out or give it a score")
