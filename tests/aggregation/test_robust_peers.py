"""The robust rules and mixing against ByzFL on the same points, and the weights that ByzFL has not by a loop."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from grpo_fed.aggregation.merge import (
    Replies,
    centred_clipping,
    geometric_median,
    krum,
    mean,
    median,
    multi_krum,
    trimmed_mean,
)
from grpo_fed.aggregation.merge.mixing import mix_replies, with_mixing
from tests.support.merge_replies import GROUPS, P, bits, make_groups, make_replies, random_replies

ZERO = torch.zeros(P)


@pytest.fixture(scope="module")
def byzfl() -> Iterator[Callable[[str], Any]]:
    """Import modules of ByzFL without its package's `__init__`, which imports torchvision and takes seconds."""
    spec = find_spec("byzfl")
    assert spec is not None, "ByzFL is a development dependency: pip install -e .[dev]"
    assert spec.submodule_search_locations is not None
    before = {name for name in sys.modules if name.split(".")[0] == "byzfl"}
    package = ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    aggregators = ModuleType("byzfl.aggregators")
    aggregators.__path__ = [f"{package.__path__[0]}/aggregators"]
    sys.modules["byzfl.aggregators"] = aggregators
    yield lambda name: importlib.import_module(f"byzfl.aggregators.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "byzfl" and name not in before]:
        del sys.modules[name]


def draw(seed: int, clients: int = 10) -> np.ndarray:
    """Draw the points of clients, three of them far from the others."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, P))
    points[:3] = 5 * generator.normal(size=(1, P)) + generator.normal(size=(3, P))
    return points.astype(np.float32)


def near(merged: torch.Tensor, expected: np.ndarray) -> bool:
    return bool(np.abs(merged.double().numpy() - expected).max() < 2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_rules_are_those_of_byzfl(byzfl: Callable[[str], Any], seed: int) -> None:
    """ByzFL's krum sums over one neighbour less than the paper's, with the same number of hostile clients."""
    theirs, points = byzfl("aggregators"), draw(seed)
    replies, exact = make_replies(torch.from_numpy(points)), points.astype(np.float64)
    assert near(median(replies, ZERO, GROUPS).point, theirs.Median()(exact))
    assert near(trimmed_mean(replies, ZERO, GROUPS, fraction=0.3).point, theirs.TrMean(3)(exact))
    assert near(krum(replies, ZERO, GROUPS, byzantine=2).point, theirs.Krum(3)(exact))
    assert near(krum(replies, ZERO, GROUPS, byzantine=2, keep=7).point, theirs.MultiKrum(3)(exact))
    assert near(geometric_median(replies, ZERO, GROUPS).point, theirs.GeometricMedian(nu=1e-9, T=3000)(exact))
    lengths = np.linalg.norm(exact, axis=1)
    tau = float(np.sort(lengths)[4])  # the lower of the two in the middle, as half of the weight is below it
    assert near(
        centred_clipping(replies, ZERO, GROUPS, radius=0.5).point, theirs.CenteredClipping(L=1, tau=0.5 * tau)(exact)
    )


@pytest.mark.parametrize("seed", range(5))
def test_mixing_is_that_of_byzfl(byzfl: Callable[[str], Any], seed: int) -> None:
    points = draw(seed)
    mixed = mix_replies(make_replies(torch.from_numpy(points)), ZERO, 3)
    expected = byzfl("preaggregators").NNM(3)(points.astype(np.float64))
    assert all(near(reply.point, row) for reply, row in zip(mixed.all, expected, strict=True))


# By hand, and with weights -------------------------------------------------------------------------------------------


def test_a_geometric_median_has_the_least_weighted_sum_of_distances() -> None:
    replies, shared = random_replies(3)
    points = torch.stack([reply.point for reply in replies.all]).double().numpy()
    weights = np.array([reply.weight for reply in replies.all])
    best = minimize(lambda z: weights @ np.linalg.norm(points - z, axis=1), points.mean(0), tol=1e-12)
    assert np.abs(geometric_median(replies, shared, GROUPS).point.double().numpy() - best.x).max() < 1e-4


def test_a_geometric_median_of_a_line_is_its_median_and_of_a_square_its_centre() -> None:
    groups = make_groups([0, 0])
    line = make_replies(torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]))
    torch.testing.assert_close(geometric_median(line, torch.zeros(2), groups).point, torch.ones(2), atol=1e-6, rtol=0)
    square = make_replies(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]))
    torch.testing.assert_close(geometric_median(square, torch.zeros(2), groups).point, torch.ones(2))


@pytest.mark.parametrize("far", [1e3, 1e10, 1e30])
def test_distant_clients_do_not_spoil_the_digits_of_a_geometric_median(far: float) -> None:
    points = torch.from_numpy(draw(0))
    points[:3] = far
    merged = geometric_median(make_replies(points), ZERO, GROUPS).point
    assert (merged - points[3:].mean(0)).abs().max() < 1.5


def test_clipping_by_hand() -> None:
    """Updates of 1, 2 and 8 with radius 1 have the median 2: (1 + 2 + 2) / 3 further than 10."""
    replies = make_replies(torch.tensor([[11.0], [12.0], [18.0]]))
    clipped = centred_clipping(replies, torch.tensor([10.0]), make_groups([0]))
    assert clipped.point.item() == pytest.approx(10 + 5 / 3)
    weighted = make_replies(torch.tensor([[11.0], [12.0], [18.0]]), [4.0, 1.0, 1.0])
    clipped = centred_clipping(weighted, torch.tensor([10.0]), make_groups([0]), radius=2.0)
    assert clipped.point.item() == pytest.approx(10 + (4 * 1 + 2 + 2) / 6)


def test_a_radius_beyond_all_updates_is_the_mean() -> None:
    replies, shared = random_replies(5)
    far = centred_clipping(replies, shared, GROUPS, radius=1e9).point
    assert bits(far) == bits(mean(replies, shared, GROUPS).point)


def test_multi_krum_keeps_all_but_the_hostile() -> None:
    points = torch.from_numpy(draw(1))
    merged = multi_krum(make_replies(points), ZERO, GROUPS, byzantine=3)
    assert merged.notes[0] == "krum: kept c03, c04, c05, c06, c07, c08, c09"
    torch.testing.assert_close(merged.point, points[3:].mean(0))


def test_mixing_by_hand() -> None:
    """On the line 0, 1, 3, 10 without one: 0 and 1 have {0, 1, 3}, 3 has {3, 1, 0}, 10 has {10, 3, 1}."""
    line = make_replies(torch.tensor([[0.0], [1.0], [3.0], [10.0]]))
    mixed = mix_replies(line, torch.zeros(1), 1)
    expected = [4 / 3, 4 / 3, 4 / 3, 14 / 3]
    assert [reply.point.item() for reply in mixed.all] == pytest.approx(expected)
    heavy = make_replies(torch.tensor([[0.0], [1.0], [3.0], [10.0]]), [1.0, 2.0, 1.0, 1.0])
    assert mix_replies(heavy, torch.zeros(1), 1).all[3].point.item() == pytest.approx((10 + 3 + 2 * 1) / 4)


def test_deviations_after_mixing_are_those_of_what_clients_sent() -> None:
    replies, shared = random_replies(6)
    merged = with_mixing(median, 2)(replies, shared, GROUPS)
    norms = [(replies.all[0].point - merged.point)[GROUPS.ids == group].norm() for group in range(3)]
    torch.testing.assert_close(merged.deviations[0], torch.stack(norms))
    assert with_mixing(median, 0) is median
    assert mix_replies(Replies(()), shared, 2).all == ()
