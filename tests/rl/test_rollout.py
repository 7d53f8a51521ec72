"""Where steps are split into episodes: against a loop over them."""

import numpy as np
import pytest

from grpo_fed.rl.episode_sums import split_sums


def split_by_loop(sums: np.ndarray, ends: np.ndarray) -> tuple[list[float], list[float]]:
    """Subtract from each sum at an end the one at the end before, episode by episode."""
    episodes, before = [], {}
    for t, row in np.argwhere(ends).tolist():
        episodes.append(float(sums[t, row] - before.get(row, 0.0)))
        before[row] = sums[t, row]
    return episodes, [float(sums[-1, row] - before.get(row, 0.0)) for row in range(sums.shape[1])]


@pytest.mark.parametrize("share_of_ends", [0.0, 0.01, 0.3, 1.0])
def test_sums_are_split_at_the_ends_as_by_a_loop(share_of_ends: float):
    rng = np.random.default_rng(4)
    sums = rng.normal(size=37) + np.cumsum(rng.normal(size=(50, 37)), 0)
    ends = rng.random(sums.shape) < share_of_ends
    episodes, running = split_sums(sums, *np.nonzero(ends))
    assert (episodes.tolist(), running.tolist()) == split_by_loop(sums, ends)


def test_sums_are_split_by_hand():
    sums = np.array([[1, 5], [2, 6], [4, 7]])  # the first copy's episodes end after its first and second step
    episodes, running = split_sums(sums, np.array([0, 1]), np.array([0, 0]))
    assert (episodes.tolist(), running.tolist()) == ([1, 1], [2, 7])
