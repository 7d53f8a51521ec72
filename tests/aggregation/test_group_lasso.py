"""The group lasso between clients: numbers by hand, exact promises, and an independent solver."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from grpo_fed.aggregation.merge import huber, mean
from grpo_fed.aggregation.merge.group_lasso import group_thresholds
from tests.support.merge_replies import GROUPS, P, bits, make_groups, make_replies, random_replies

SEEDS = st.integers(0, 2**32 - 1)


def test_the_group_lasso_by_hand() -> None:
    """Tau is 0.5 * sqrt(4) = 1. Three near clients are pulled by one far one: 3 |s| = 1."""
    points = torch.zeros(4, 4)
    points[3, 1] = 10.0
    merged = huber(make_replies(points), torch.zeros(4), make_groups([0] * 4), threshold=0.5, refit=False)
    torch.testing.assert_close(merged.point, torch.tensor([0.0, 1 / 3, 0.0, 0.0]))
    assert merged.departed[:, 0].tolist() == [False, False, False, True]
    torch.testing.assert_close(merged.deviations[:, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 10 - 1 / 3]))


@pytest.mark.parametrize("far", [10.0, 1e3, 1e6, 1e9, 1e15, 1e30])
def test_the_pull_of_a_departed_client_is_bounded(far: float) -> None:
    """The bound is its weight times tau, at any distance: s moves by 2 * 1 / (3 + 5) towards it."""
    points = torch.full((3, 4), 0.3)
    points[0, 0] = far
    replies = make_replies(points, [2.0, 3.0, 5.0])
    merged = huber(replies, torch.zeros(4), make_groups([0] * 4), threshold=0.5, refit=False)
    torch.testing.assert_close(merged.point, torch.tensor([0.55, 0.3, 0.3, 0.3]))
    assert merged.departed[:, 0].tolist() == [True, False, False]


@pytest.mark.parametrize("heavier", [1.001, 1.1, 3.0])
def test_the_heavier_of_two_far_clients_is_followed(heavier: float) -> None:
    """The bottom is nearly flat between them; it ends where heavier * |s - theta| = tau. Both directions of weights."""
    points = torch.tensor([[0.0], [100.0]])
    for weights, expected in (([heavier, 1.0], 1 / heavier), ([1.0, heavier], 100 - 1 / heavier)):
        merged = huber(make_replies(points, weights), torch.zeros(1), make_groups([0]), threshold=1.0, refit=False)
        torch.testing.assert_close(merged.point, torch.tensor([expected]), rtol=1e-4, atol=1e-4)


def test_after_the_refit_a_departed_client_does_not_pull() -> None:
    """Those who stay, of weights 3 and 5, have the mean (3 * 0.2 + 5 * 0.6) / 8; the others' deviations are from it."""
    points = torch.zeros(4, 4)
    points[:, 0] = torch.tensor([0.2, 0.6, 10.0, -7.0])
    replies = make_replies(points, [3.0, 5.0, 2.0, 1.0])
    merged = huber(replies, torch.zeros(4), make_groups([0] * 4), threshold=0.5)
    torch.testing.assert_close(merged.point, torch.tensor([0.45, 0.0, 0.0, 0.0]))
    assert merged.departed[:, 0].tolist() == [False, False, True, True]
    torch.testing.assert_close(merged.deviations[:, 0], torch.tensor([0.25, 0.15, 9.55, 7.45]))


def test_the_refit_changes_no_departure_and_no_deserted_group() -> None:
    """Each group with its own stayers, and one that all leave: two far from each other and from where they meet."""
    points = torch.zeros(3, 4)
    points[2, 0], points[1, 1] = 10.0, 20.0
    points[:, 2] = torch.tensor([-50.0, 0.5, 60.0])
    for refit, expected in ((False, [0.5, 0.5]), (True, [0.0, 0.0])):
        merged = huber(make_replies(points), torch.zeros(4), make_groups([0, 1, 2, 3]), threshold=1.0, refit=refit)
        torch.testing.assert_close(merged.point[:2], torch.tensor(expected))
        assert merged.departed.T.tolist() == [
            [False, False, True],
            [False, True, False],
            [True, False, True],
            [False, False, False],
        ]
    everybody = torch.tensor([[-50.0], [50.0]])
    with_, without = (
        huber(make_replies(everybody), torch.zeros(1), make_groups([0]), threshold=1.0, refit=refit)
        for refit in (True, False)
    )
    assert with_.departed.all()
    assert bits(with_.point) == bits(without.point)


@given(SEEDS)
def test_an_infinite_threshold_gives_the_mean_bit_for_bit(seed: int) -> None:
    replies, shared = random_replies(seed)
    merged = huber(replies, shared, GROUPS, threshold=float("inf"))
    assert bits(merged.point) == bits(mean(replies, shared, GROUPS).point)
    assert not merged.departed.any()


@given(SEEDS)
def test_threshold_zero_makes_every_client_depart_everywhere(seed: int) -> None:
    replies, shared = random_replies(seed)
    merged = huber(replies, shared, GROUPS, threshold=0.0)
    assert merged.departed.all()
    grouped = GROUPS.ids >= 0
    assert bits(merged.point[grouped]) == bits(shared[grouped])
    assert bits(merged.point[~grouped]) == bits(mean(replies, shared, GROUPS).point[~grouped])


def test_threshold_zero_makes_unmoved_clients_depart_too() -> None:
    assert huber(make_replies(torch.ones(3, P)), torch.ones(P), GROUPS, threshold=0.0).departed.all()


def huber_cost(s: np.ndarray, points: np.ndarray, weights: np.ndarray, tau: float) -> tuple[float, np.ndarray]:
    """Compute the cost of the group lasso for one group, with the best delta of each client, and its gradient by s."""
    offsets = points - s
    shrunk = offsets * np.maximum(0.0, 1 - tau / np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-300))
    left = offsets - shrunk
    value = 0.5 * (left**2).sum(1) + tau * np.linalg.norm(shrunk, axis=1)
    return float(weights @ value), -weights @ left


@given(SEEDS, st.integers(2, 8), st.integers(1, 12), st.floats(-3.0, 1.5))
def test_the_group_lasso_is_solved_as_well_as_by_scipy(
    seed: int, clients: int, size: int, log_threshold: float
) -> None:
    """The solver is quasi-Newton; clients are at all distances, and the threshold is anywhere among them."""
    generator = np.random.default_rng(seed)
    scale = np.exp(generator.normal(size=(clients, 1)))
    points = (generator.normal(size=(clients, size)) * scale).astype(np.float32)
    weights = generator.choice([0.5, 1.0, 1.0, 2.0], clients)
    threshold = float(np.exp(log_threshold))
    tau = threshold * size**0.5
    replies = make_replies(torch.from_numpy(points), weights.tolist())
    merged = huber(replies, torch.zeros(size), make_groups([0] * size), threshold=threshold, refit=False)
    problem = (points.astype(np.float64), weights, tau)
    ours, slope = huber_cost(merged.point.double().numpy(), *problem)
    theirs = minimize(huber_cost, points.mean(0).astype(np.float64), problem, "L-BFGS-B", jac=True, tol=1e-14)
    assert ours <= theirs.fun * (1 + 1e-9) + 1e-12
    assert np.linalg.norm(slope) <= 1e-5 * weights.sum() * tau
    assert torch.equal(merged.departed[:, 0], merged.deviations[:, 0] > tau)


def test_both_forms_of_the_iteration_find_the_same_solution() -> None:
    """The same clients, whose last parameters are all 0: those take part in nothing but the threshold."""
    generator = np.random.default_rng(0)
    points = torch.zeros(12, 300)
    points[:, :3] = torch.from_numpy(generator.standard_t(1.5, size=(12, 3))).float()
    few = huber(make_replies(points[:, :3]), torch.zeros(3), make_groups([0] * 3), threshold=1.5 / 3**0.5)
    many = huber(make_replies(points), torch.zeros(300), make_groups([0] * 300), threshold=1.5 / 300**0.5)
    assert 0 < few.departed.sum() < 12
    assert torch.equal(few.departed, many.departed)
    torch.testing.assert_close(few.point, many.point[:3], rtol=1e-6, atol=1e-6)


def test_groups_are_solved_independently() -> None:
    """Merged together or each alone; groups of unlike sizes that lie scattered, some with departures."""
    generator = np.random.default_rng(5)
    ids = generator.permutation(np.repeat([0, 1, 2, 3], [5, 5, 30, 200])).tolist()
    points = torch.from_numpy(generator.normal(size=(9, 240)) * np.exp(generator.normal(size=(9, 1)))).float()
    shared = torch.zeros(240)
    together = huber(make_replies(points), shared, make_groups(ids), threshold=1.0)
    assert together.departed.any()
    assert not together.departed.all()
    for group in range(4):
        columns = torch.tensor(ids) == group
        size = int(columns.sum())
        alone = huber(make_replies(points[:, columns]), shared[columns], make_groups([0] * size), threshold=1.0)
        torch.testing.assert_close(together.point[columns], alone.point, rtol=1e-6, atol=1e-6)
        assert torch.equal(together.departed[:, group], alone.departed[:, 0])


def test_a_group_without_departures_has_the_bits_of_the_mean() -> None:
    replies, shared = random_replies(6)
    points = torch.stack([reply.point for reply in replies.all])
    points[0, :4] += 100.0
    points[:, 4:8] *= 1e-3
    replies = make_replies(points, [reply.weight for reply in replies.all])
    merged = huber(replies, shared, GROUPS, threshold=1.0)
    assert merged.departed[0, 0]
    assert not merged.departed[:, 1].any()
    calm = [4, 5, 6, 7, 10, 11]
    assert bits(merged.point[calm]) == bits(mean(replies, shared, GROUPS).point[calm])


def test_a_few_far_clients_do_not_make_others_depart() -> None:
    """Six of twenty lie 1000 away, so the mean lies 300 from the fourteen others, whose threshold is 1 all the same."""
    generator = np.random.default_rng(7)
    points = torch.from_numpy(0.1 * generator.normal(size=(20, 4))).float()
    points[:6] += 500.0
    merged = huber(make_replies(points), torch.zeros(4), make_groups([0] * 4), threshold=0.5)
    assert merged.departed[:, 0].tolist() == [True] * 6 + [False] * 14


def test_blocks_have_thresholds_of_their_own() -> None:
    tau = group_thresholds(GROUPS, 0.5, {"b": 3.0})
    torch.testing.assert_close(tau, torch.tensor([1.0, 1.0, 3 * 2**0.5], dtype=torch.float64))
    points = torch.zeros(4, P)
    points[3, [0, 8]] = 4.0  # more than 1, less than 3 sqrt(2)
    merged = huber(make_replies(points), torch.zeros(P), GROUPS, threshold=0.5, blocks={"b*": 3.0})
    assert merged.departed[3].tolist() == [True, False, False]


def test_unknown_and_overlapping_patterns_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r'merge.blocks: "critic" matches no block; there are \["a", "b"\]'):
        group_thresholds(GROUPS, 0.5, {"critic": 3.0})
    with pytest.raises(ValueError, match=r'merge.blocks: "\*" and "a" both match "a"; narrow one of the patterns'):
        group_thresholds(GROUPS, 0.5, {"*": 3.0, "a": 1.0})
