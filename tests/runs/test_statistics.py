"""Statistics of few seeds: numbers worked by hand, and scipy's beside ours."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from grpo_fed.runs.statistics import (
    estimate,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    stratified_resamples,
    whole_resamples,
)


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    # 1, 2 and 7, 8 go; 3, 4, 5, 6 stay.
    assert interquartile_mean(np.array([[8.0], [1], [7], [2], [6], [3], [5], [4]])) == 4.5


def test_interquartile_mean_ignores_one_failed_and_one_lucky_seed():
    assert interquartile_mean(np.array([[-1000.0], [1], [7], [2], [6], [3], [5], [1000]])) == (2 + 3 + 5 + 6) / 4


def test_interquartile_mean_pools_the_tasks():
    # Sorted together: 1, 2, 3, 100; 1 and 100 go.
    assert interquartile_mean(np.array([[1.0, 100.0], [2.0, 3.0]])) == 2.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (10, 1), (10, 3), (5, 7)])
def test_interquartile_mean_agrees_with_scipy(shape: tuple[int, int]):
    scores = np.random.default_rng(0).normal(size=(4, *shape))
    expected = [stats.trim_mean(sample, 0.25, axis=None) for sample in scores]
    np.testing.assert_allclose(interquartile_mean(scores), expected, rtol=1e-12)


def test_probability_of_improvement_counts_the_pairs_won():
    # 3 beats 2 and 0; 1 beats 0 only: three pairs of four.
    assert probability_of_improvement(np.array([[3.0], [1.0]]), np.array([[2.0], [0.0]])) == 0.75


def test_a_tie_counts_half():
    # Against 500: a tie and a loss, (0.5 + 0) / 2.
    assert probability_of_improvement(np.array([[500.0], [400.0]]), np.array([[500.0]])) == 0.25


def test_tasks_have_equal_weights_in_the_probability_of_improvement():
    # Always better on the first task (1), always worse on the second (0), equal on the third (0.5).
    ours = np.array([[1.0, -200.0, 7.0], [2.0, -200.0, 7.0]])
    theirs = np.array([[0.0, -100.0, 7.0]])
    assert probability_of_improvement(ours, theirs) == 0.5


def test_probability_of_improvement_agrees_with_the_mann_whitney_statistic():
    generator = np.random.default_rng(1)
    ours = generator.integers(0, 6, size=(10, 3)).astype(float)
    theirs = generator.integers(0, 6, size=(7, 3)).astype(float)
    expected = np.mean([stats.mannwhitneyu(ours[:, t], theirs[:, t]).statistic / 70 for t in range(3)])
    np.testing.assert_allclose(probability_of_improvement(ours, theirs), expected, rtol=1e-12)
    np.testing.assert_allclose(probability_of_improvement(theirs, ours), 1 - expected, rtol=1e-12)


def test_a_performance_profile_counts_the_scores_above_each_threshold():
    scores = np.array([[1.0, 4.0], [3.0, 4.0]])
    # above 0: 4 of 4; above 1: 3, as 1 is not above 1; above 3: 2; above 4: none
    assert performance_profile(scores, np.array([0.0, 1.0, 3.0, 4.0])).tolist() == [1.0, 0.75, 0.5, 0.0]


def test_a_performance_profile_agrees_with_scipys_distribution_function():
    scores = np.random.default_rng(3).normal(size=(5, 4)).round(1)
    thresholds = np.linspace(-2, 2, 9)
    expected = stats.ecdf(scores.ravel()).sf.evaluate(thresholds)
    assert np.allclose(performance_profile(scores, thresholds), expected)
    stacked = performance_profile(np.stack([scores, scores + 1]), thresholds)
    assert np.allclose(stacked[0], expected)
    assert np.allclose(stacked[1], stats.ecdf(scores.ravel() + 1).sf.evaluate(thresholds))


def test_a_resample_takes_each_task_from_its_own_scores():
    scores = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    resampled = stratified_resamples(scores, np.random.default_rng(0), resamples=200)
    assert set(resampled[..., 0].ravel()) == {1.0, 2.0, 3.0}
    assert set(resampled[..., 1].ravel()) == {10.0, 20.0, 30.0}


def test_tasks_are_resampled_independently():
    # Whole rows would always hold two zeros and two ones. On its own, each value is a fair coin: the middle two of
    # four are 0 where at most one is heads, (1 + 4) / 16 of the resamples.
    resampled = stratified_resamples(np.array([[0.0, 1.0], [1.0, 0.0]]), np.random.default_rng(0), resamples=20_000)
    assert np.mean(interquartile_mean(resampled) == 0) == pytest.approx(5 / 16, abs=0.015)


def test_whole_seeds_keep_their_tasks_together():
    resampled = whole_resamples(np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]), np.random.default_rng(0), 200)
    assert set(map(tuple, resampled.reshape(-1, 2))) == {(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)}
    assert resampled.shape == (200, 3, 2)


def test_copies_of_a_task_do_not_narrow_the_interval_of_whole_seeds():
    # Ten copies of one task: by whole seeds the interval is that of one alone, task by task it is a third as wide.
    single = np.random.default_rng(0).normal(size=(8, 1))

    def width(scores: np.ndarray, whole_seeds: bool) -> float:
        interval = estimate(interquartile_mean, scores, generator=np.random.default_rng(1), whole_seeds=whole_seeds)
        return interval.high - interval.low

    copies = np.tile(single, (1, 10))
    assert width(copies, whole_seeds=True) == pytest.approx(width(single, whole_seeds=True), rel=0.25)
    assert width(copies, whole_seeds=False) < width(copies, whole_seeds=True) / 2


def test_equal_seeds_have_an_interval_of_width_0():
    result = estimate(interquartile_mean, np.tile([0.0, 10.0], (6, 1)), generator=np.random.default_rng(0))
    assert (result.value, result.low, result.high) == (5.0, 5.0, 5.0)


def test_the_interval_agrees_with_scipys_bootstrap():
    scores = np.random.default_rng(2).normal(size=20)
    ours = estimate(interquartile_mean, scores[:, None], generator=np.random.default_rng(3), resamples=20_000)
    theirs = stats.bootstrap(
        (scores,),
        lambda sample, axis: stats.trim_mean(sample, 0.25, axis=axis),
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    # The interval is about 1 wide; a percentile of 20,000 resamples is off by about 0.005.
    assert ours.value == pytest.approx(stats.trim_mean(scores, 0.25), rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_both_sides_of_a_comparison_are_resampled():
    ours, theirs = np.array([[1.0], [3.0]]), np.array([[0.0], [2.0]])
    result = estimate(probability_of_improvement, ours, theirs, generator=np.random.default_rng(0))
    # Three pairs of four. A resample of 1, 1 against 2, 2 wins none (1 in 16), and 0, 0 or 3, 3 wins all.
    assert (result.value, result.low, result.high) == (0.75, 0.0, 1.0)


def test_the_same_generator_gives_the_same_interval():
    scores = np.random.default_rng(0).normal(size=(10, 2))
    first, second = (estimate(interquartile_mean, scores, generator=np.random.default_rng(7)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_score_is_refused(bad: float):
    scores = np.array([[1.0], [bad], [2.0], [3.0]])
    with pytest.raises(ValueError, match="leave the run out"):
        estimate(interquartile_mean, scores, generator=np.random.default_rng(0))


def test_scores_without_a_task_axis_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\): expected \[seeds, tasks\]"):
        estimate(interquartile_mean, np.ones(3), generator=np.random.default_rng(0))
