"""A client's choice between its own parameters and the shared ones, with numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_fed.federation.comparison import TIMES, ReturnHistory, compare_by_playing, compare_returns

LEARNED = ReturnHistory(lowest=20.0, highest=200.0, spread=10.0, last=190.0)


def around(mean: float, spread: float, count: int = 16) -> np.ndarray:
    """Returns with exactly this mean and standard deviation (of count - 1)."""
    values = np.tile([1.0, -1.0], count // 2)
    return mean + values * spread / values.std(ddof=1)


def test_sharing_is_no_worse_within_a_tenth_of_what_was_learned():
    # Learned: 200 - 20 = 180, of which a tenth is 18. The differences are constant, so their error is 0.
    own = around(200, 10)
    assert compare_returns(np.stack([own, own - 17]), LEARNED, has_left=True).shares
    assert not compare_returns(np.stack([own, own - 19]), LEARNED, has_left=True).shares


def test_the_error_of_the_difference_counts_at_99_percent():
    # Differences of mean -10 and standard error 16 / 4 = 4: -10 - 2.33 x 4 = -19.3 < -18; with 12 / 4: -17 > -18.
    own = np.full(16, 200.0)
    assert not compare_returns(np.stack([own, around(190, 16)]), LEARNED, has_left=True).shares
    assert compare_returns(np.stack([own, around(190, 12)]), LEARNED, has_left=True).shares


def test_where_nothing_is_decided_all_stays_as_it_was():
    own, shared = np.full(16, 200.0), around(195, 60)
    for has_left in (True, False):
        comparison = compare_returns(np.stack([own, shared]), LEARNED, has_left)
        assert comparison.is_open
        assert comparison.shares is not has_left


def test_a_client_that_has_learned_nothing_yet_begins_with_its_own():
    returns = np.stack([around(21, 8), around(21, 8)])
    comparison = compare_returns(returns, LEARNED, has_left=False)
    assert not comparison.is_open
    assert not comparison.shares
    assert comparison.learned == pytest.approx(1.0)


def test_a_client_that_has_learned_nothing_takes_what_is_clearly_better():
    assert compare_returns(np.stack([around(21, 8), around(121, 8)]), LEARNED, has_left=True).shares


def test_without_a_finished_episode_in_any_round_nothing_is_learned():
    comparison = compare_returns(np.stack([around(200, 1), around(200, 1)]), ReturnHistory(), has_left=False)
    assert not comparison.shares
    assert comparison.learned == 0.0


def test_the_history_keeps_lowest_highest_spread_and_last():
    history = ReturnHistory()
    for mean, spread in ((30.0, 5.0), (math.nan, 0.0), (10.0, 9.0), (50.0, 2.0)):
        history = history.after(mean, spread)
    assert history == ReturnHistory(10.0, 50.0, 9.0, 50.0)
    assert ReturnHistory.read(history.arrays()) == history
    assert math.isnan(ReturnHistory.read(None).last)


def test_returns_are_low_in_the_lowest_quarter_of_their_range():
    # The range is 20 to 200: its lowest quarter ends at 65.
    assert LEARNED.is_low(64.0)
    assert not LEARNED.is_low(66.0)


def test_returns_of_one_round_that_vary_like_those_of_all_rounds_are_never_low():
    assert not ReturnHistory(lowest=20.0, highest=200.0, spread=121.0, last=190.0).is_low(20.0)
    assert not ReturnHistory().is_low(0.0)


def test_a_client_plays_on_until_it_is_decided_and_at_most_four_times():
    played: list[tuple[tuple[str, ...], bool, int]] = []

    def play(clients: list[str], own: bool, batch: int) -> list[np.ndarray]:
        played.append((tuple(clients), own, batch))
        returns = {"clear": (200.0, 10.0), "never": (200.0, 195.0), "second": (200.0, 196.0)}
        spread = {"clear": 1.0, "never": 200.0, "second": 20.0}
        return [np.full(16, 200.0) if own else around(returns[name][1], spread[name]) for name in clients]

    names = ("clear", "never", "second")
    comparisons = compare_by_playing(dict.fromkeys(names, LEARNED), set(), play)  # type: ignore[arg-type]
    # second: the error of a difference of -4 is 20 / 4 = 5, then 20 / sqrt(32) = 3.5: -4 - 2.33 x 3.5 = -12.2 > -18.
    assert {name: comparison.episodes for name, comparison in comparisons.items()} == {
        "clear": 32,
        "never": 32 * TIMES,
        "second": 32,
    }
    assert {name: comparison.shares for name, comparison in comparisons.items()} == {
        "clear": False,
        "never": True,
        "second": True,
    }
    assert played[:2] == [(names, True, 0), (names, False, 0)]
    assert played[2:] == [(("never",), own, batch) for batch in range(1, TIMES) for own in (True, False)]
