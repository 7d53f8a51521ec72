"""Robust merge rules: numbers by hand, numpy's median, scipy's trimmed mean, and hostile clients."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean

from grpo_fed.aggregation.merge import krum, mean, median, trimmed_mean
from tests.support.merge_replies import GROUPS, P, bits, make_groups, make_replies, random_replies

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 9))
def test_the_median_is_that_of_numpy(seed: int, clients: int) -> None:
    points = np.random.default_rng(seed).normal(size=(clients, P)).astype(np.float32)
    merged = median(make_replies(torch.from_numpy(points)), torch.zeros(P), GROUPS).point
    assert bits(merged) == bits(torch.from_numpy(np.median(points.astype(np.float64), axis=0)).float())


@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=7))
def test_an_integer_weight_counts_as_that_many_clients(seed: int, counts: list[int]) -> None:
    """Also of weights of another scale, which are not exact."""
    points = np.random.default_rng(seed).normal(size=(len(counts), P)).astype(np.float32)
    repeated = np.repeat(points, counts, axis=0).astype(np.float64)
    for scale in (1.0, 0.1):
        replies = make_replies(torch.from_numpy(points), [scale * count for count in counts])
        merged = median(replies, torch.zeros(P), GROUPS).point
        torch.testing.assert_close(merged.double(), torch.from_numpy(np.median(repeated, axis=0)))
        merged = trimmed_mean(replies, torch.zeros(P), GROUPS, fraction=1 / 4).point
        quarters = trim_mean(np.repeat(repeated, 4, axis=0), 1 / 4)
        torch.testing.assert_close(merged.double(), torch.from_numpy(quarters), rtol=1e-5, atol=1e-6)


def test_a_trimmed_mean_by_hand() -> None:
    """A fraction of 0.3 of five clients cuts one and a half: (0.5 * 2 + 3 + 0.5 * 4) / 2; with none it is the mean."""
    points = torch.tensor([[5.0], [1.0], [3.0], [2.0], [1e9]]).expand(5, P)
    cut = trimmed_mean(make_replies(points), torch.zeros(P), GROUPS, fraction=0.3)
    torch.testing.assert_close(cut.point, torch.full((P,), (0.5 * 2 + 3 + 0.5 * 5) / 2))
    replies, shared = random_replies(8)
    whole = trimmed_mean(replies, shared, GROUPS, fraction=0.0)
    assert bits(whole.point) == bits(mean(replies, shared, GROUPS).point)


def test_the_median_covers_more_columns_than_one_sort() -> None:
    points = torch.randn(3, 400_000)
    groups = make_groups([0] * 400_000)
    merged = median(make_replies(points), torch.zeros(400_000), groups).point
    assert torch.equal(merged, points.median(0).values)


def test_krum_by_hand() -> None:
    """Seven on a line, two byzantine: three nearest count, and 24 has 1 + 9 + 36, 25 has 1 + 4 + 49, 27 has 4 + 9 + 81.

    With two nearest 25 would win, and with four 18.
    """
    line = make_replies(torch.tensor([[2.0], [4.0], [8.0], [18.0], [24.0], [25.0], [27.0]]))
    single = krum(line, torch.zeros(1), make_groups([0]), byzantine=2)
    assert (single.point.item(), single.notes) == (24.0, ("krum: kept c04",))
    three = krum(line, torch.zeros(1), make_groups([0]), byzantine=2, keep=3)
    assert three.point.item() == pytest.approx(76 / 3)
    assert three.notes == ("krum: kept c04, c05, c06",)


def test_krum_never_chooses_hostile_clients() -> None:
    """Two of seven, together or each for itself, near or far."""
    for seed, far, together in itertools.product(range(10), (20.0, 1e8), (True, False)):
        generator = np.random.default_rng(seed)
        points = generator.normal(size=(7, P))
        points[[1, 4]] += far * generator.normal(size=(1 if together else 2, P))
        merged = krum(make_replies(torch.from_numpy(points).float()), torch.zeros(P), GROUPS, byzantine=2, keep=3)
        assert not {"c01", "c04"} & set(merged.notes[0].removeprefix("krum: kept ").split(", "))


def test_krum_notes_when_its_guarantee_does_not_hold() -> None:
    merged = krum(make_replies(torch.randn(4, P)), torch.zeros(P), GROUPS, byzantine=1)
    assert merged.notes[1] == "krum: 4 replies; against 1 byzantine it needs 5"
