"""What hostile clients send: numbers by hand, ByzFL's formulas written out, and what each attack promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from grpo_fed.aggregation.attacks import (
    COLLUDING,
    HonestRound,
    alie,
    inner_product,
    mimic,
    min_max,
    normalised,
    random_step,
    reverse,
    scale,
    stealth,
)


def honest_round(
    points: Tensor, shared: Tensor | None = None, hostile: int = 3, merge: Callable[[Tensor], Tensor] | None = None
) -> HonestRound:
    """Make the knowledge of colluding clients; the server takes the mean of all clients unless `merge` is given."""
    points = points.double()
    shared = torch.zeros_like(points[0]) if shared is None else shared.double()
    count = len(points) + hostile
    return HonestRound(points, shared, hostile, merge or (lambda point: (points.sum(0) + hostile * point) / count))


def draw(seed: int, honest: int = 7, size: int = 20) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.5, 1.0, (honest, size)))


def test_a_client_alone_by_hand() -> None:
    """From 10 to 12 is an update of 2."""
    point, shared = torch.tensor([12.0]), torch.tensor([10.0])
    assert reverse(point, shared, 1.0).item() == 8
    assert scale(point, shared, 100.0).item() == 210
    step = random_step(torch.ones(50), torch.zeros(50), 10.0, torch.Generator().manual_seed(0))
    assert step.norm().item() == pytest.approx(10 * 50**0.5)
    again = random_step(torch.ones(50), torch.zeros(50), 10.0, torch.Generator().manual_seed(0))
    assert torch.equal(step, again)


def test_a_little_is_the_mean_less_some_standard_deviations() -> None:
    """Of 10 clients and 3 hostile ones 6 - 3 = 3 honest ones are needed for a majority: Phi(z) = (7 - 3) / 7."""
    points = draw(0)
    exact = points.numpy()
    expected = exact.mean(0) - norm.ppf(4 / 7) * exact.std(0, ddof=1)
    np.testing.assert_allclose(alie(honest_round(points), None).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(alie(honest_round(points), 1.5).numpy(), exact.mean(0) - 1.5 * exact.std(0, ddof=1))


def test_an_inner_product_is_turned_negative() -> None:
    points, shared = draw(1), torch.full((20,), 3.0)
    forged = inner_product(honest_round(points, shared), 2.0)
    torch.testing.assert_close(forged - shared, -2 * (points.mean(0) - shared))
    assert float((inner_product(honest_round(points, shared), None) - shared) @ (points.mean(0) - shared)) < 0


def test_mimic_sends_what_one_client_sent() -> None:
    """The clients differ along the first axis, on which the last is furthest out."""
    points = torch.tensor([[-1.0, 0.1], [0.0, -0.1], [1.0, 0.0], [4.0, 0.05]]).double()
    assert torch.equal(mimic(honest_round(points), None), points[3])


@pytest.mark.parametrize("seed", range(5))
def test_min_max_is_as_far_as_distances_between_honest_clients_allow(seed: int) -> None:
    points = draw(seed)
    forged = min_max(honest_round(points), None)
    between = torch.cdist(points, points).max()
    assert float((points - forged).norm(dim=1).max()) == pytest.approx(float(between), rel=1e-9)
    assert float((forged - points.mean(0)) @ points.mean(0)) < 0


@pytest.mark.parametrize("seed", range(5))
def test_stealth_stays_within_every_range_and_the_usual_distance(seed: int) -> None:
    points = draw(seed)
    forged, mean = stealth(honest_round(points), None), points.mean(0)
    assert bool((forged >= points.min(0).values).all() and (forged <= points.max(0).values).all())
    assert float((forged - mean).norm()) <= float((points - mean).norm(dim=1).median()) * (1 + 1e-12)
    assert bool(((forged - mean) * mean.sign() <= 0).all())


def test_normalised_turns_the_merge_further_than_a_reversed_mean() -> None:
    round = honest_round(draw(2))
    before = round.merge(round.mean)

    def turned(point: Tensor) -> float:
        after = round.merge(point)
        return float((after / after.norm() - before / before.norm()).norm())

    forged = normalised(round, None)
    assert turned(forged) > turned(inner_product(round, 1.0))
    assert turned(forged) == pytest.approx(2.0)  # 3 of 10 clients that send 16 times the reverse turn a mean around


def test_normalised_finds_a_step_that_the_rule_does_not_ignore() -> None:
    """A server that leaves out points more than 3 away from the honest mean is not turned by long steps."""
    points = draw(3)
    honest = points.mean(0)
    near = honest_round(points, merge=lambda point: honest + (point - honest) * float((point - honest).norm() < 3))
    assert float((normalised(near, None) - honest).norm()) < 3
    assert float((near.merge(normalised(near, None)) - honest).norm()) > 0


@pytest.mark.parametrize("attack", COLLUDING.values(), ids=COLLUDING.keys())
def test_one_honest_client_or_equal_ones_give_finite_points(attack: Callable[..., Tensor]) -> None:
    for points in (torch.ones(1, 4), torch.ones(3, 4), torch.zeros(2, 4)):
        assert bool(attack(honest_round(points), None).isfinite().all())
