"""The robust rules and mixing against loops written from the papers' definitions, and by hand.

`python -m benchmarks.byzfl_peer` compares the same rules with ByzFL's.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
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

Points = NDArray[np.float64]
ZERO = torch.zeros(P)


def draw(seed: int, clients: int = 10) -> NDArray[np.float32]:
    """Draw the points of clients, three of them away from the others."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, P))
    points[:3] = 2 * generator.normal(size=(1, P)) + generator.normal(size=(3, P))
    return points.astype(np.float32)


def near(merged: torch.Tensor, expected: Points) -> bool:
    return bool(np.abs(merged.double().numpy() - expected).max() < 1e-6)


# The papers' definitions, for equal weights --------------------------------------------------------------------------


def distance(one: Points, other: Points) -> float:
    return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(one, other, strict=True)))


def defined_median(points: Points) -> Points:
    """Yin et al. 2018, definition 1: the median of each coordinate."""
    result = []
    for column in points.T:
        values = sorted(column)
        middle = len(values) // 2
        result.append(values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2)
    return np.array(result)


def defined_trimmed_mean(points: Points, cut: int) -> Points:
    """Yin et al. 2018, definition 2: the mean of each coordinate without its `cut` least and largest values."""
    return np.array([sum(sorted(column)[cut : len(points) - cut]) / (len(points) - 2 * cut) for column in points.T])


def defined_krum(points: Points, byzantine: int, keep: int) -> Points:
    """Blanchard et al. 2017, section 3: the least sums of squared distances to the n - f - 2 nearest others."""
    scores = []
    for number, point in enumerate(points):
        others = sorted(distance(point, other) ** 2 for place, other in enumerate(points) if place != number)
        scores.append((sum(others[: len(points) - byzantine - 2]), number))
    chosen = [number for _, number in sorted(scores)[:keep]]
    return np.array([sum(points[number][column] for number in chosen) / keep for column in range(points.shape[1])])


def defined_geometric_median(points: Points) -> Points:
    """Pillutla et al. 2019, equation 5, by another algorithm: Newton's, on the sum of distances itself."""
    centre = points.mean(0)
    for _ in range(50):
        gradient, curvature = np.zeros_like(centre), np.zeros((len(centre), len(centre)))
        for point in points:
            away = distance(centre, point)
            unit = (centre - point) / away
            gradient += unit
            curvature += (np.eye(len(centre)) - np.outer(unit, unit)) / away
        step = np.linalg.solve(curvature, gradient)
        length = 1.0
        before = sum(distance(centre, point) for point in points)
        while sum(distance(centre - length * step, point) for point in points) > before and length > 1e-6:
            length /= 2
        centre = centre - length * step
    return centre


def defined_clipping(points: Points, tau: float) -> Points:
    """Karimireddy et al. 2021, section 4: one step from v = 0, the mean of (x - v) min(1, tau / ||x - v||)."""
    origin = np.zeros(points.shape[1])
    return np.array(
        [
            sum(point[column] * min(1.0, tau / distance(point, origin)) for point in points) / len(points)
            for column in range(points.shape[1])
        ]
    )


def defined_mixing(points: Points, byzantine: int) -> Points:
    """Allouah et al. 2023, algorithm 2: each point becomes the mean of the n - f nearest to it."""
    rows = []
    for point in points:
        order = sorted(range(len(points)), key=lambda other: distance(point, points[other]))
        rows.append(sum(points[other] for other in order[: len(points) - byzantine]) / (len(points) - byzantine))
    return np.array(rows)


@pytest.mark.parametrize(("seed", "clients"), list(itertools.product(range(3), [9, 10])))
def test_rules_are_those_of_their_papers(seed: int, clients: int) -> None:
    points = draw(seed, clients)
    replies, exact = make_replies(torch.from_numpy(points)), points.astype(np.float64)
    assert near(median(replies, ZERO, GROUPS).point, defined_median(exact))
    assert near(trimmed_mean(replies, ZERO, GROUPS, fraction=2 / clients).point, defined_trimmed_mean(exact, 2))
    assert near(krum(replies, ZERO, GROUPS, byzantine=3).point, defined_krum(exact, 3, 1))
    assert near(krum(replies, ZERO, GROUPS, byzantine=2, keep=4).point, defined_krum(exact, 2, 4))
    assert near(multi_krum(replies, ZERO, GROUPS, byzantine=3).point, defined_krum(exact, 3, clients - 3))
    assert near(geometric_median(replies, ZERO, GROUPS).point, defined_geometric_median(exact))
    lengths = sorted(distance(row, np.zeros(P)) for row in exact)
    tau = 0.5 * lengths[(clients - 1) // 2]  # of two in the middle the lower, which half of the weight does not exceed
    assert near(centred_clipping(replies, ZERO, GROUPS, radius=0.5).point, defined_clipping(exact, tau))
    mixed = mix_replies(replies, ZERO, 3).all
    expected = defined_mixing(exact, 3)
    assert all(near(reply.point, row) for reply, row in zip(mixed, expected, strict=True))


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
