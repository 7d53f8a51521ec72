"""Merges of clients' replies: numbers by hand, exact promises, and independent solvers."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.stats import trim_mean
from torch import Tensor

from grpo_fed.aggregation.merge import (
    RULES,
    ClientWork,
    Merged,
    Replies,
    Reply,
    StreamingFisher,
    StreamingMean,
    client_weight,
    clusters,
    fisher,
    huber,
    krum,
    mean,
    median,
    trimmed_mean,
)
from grpo_fed.aggregation.merge.clustering import cluster_clients, silhouette
from grpo_fed.aggregation.merge.distances import distances
from grpo_fed.aggregation.merge.group_lasso import group_thresholds
from grpo_fed.policy.groups import Groups

P = 12
IDS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1]
"""Groups a1 and a2 of four in block a, one of two in block b, and two parameters in none."""
SEEDS = st.integers(0, 2**32 - 1)


def groups_by(ids: list[int], blocks: list[str] | None = None) -> Groups:
    """Each group in a block of its own unless said otherwise."""
    sizes = np.bincount([i for i in ids if i >= 0])
    names = tuple(f"group {number}" for number in range(len(sizes)))
    return Groups(names, torch.tensor(ids), torch.tensor(sizes).float(), tuple(blocks or names))


GROUPS = groups_by(IDS, ["a", "a", "b"])


def replies(points: Tensor, weights: list[float] | None = None, fishers: Tensor | None = None) -> Replies:
    """Of clients c00, c01, ... [K, P]."""
    return Replies.of(
        Reply(
            f"c{number:02d}",
            point,
            1.0 if weights is None else weights[number],
            None if fishers is None else fishers[number],
        )
        for number, point in enumerate(points)
    )


def bits(value: Tensor) -> list[int]:
    assert value.dtype == torch.float32
    return value.view(torch.int32).tolist()


def some(seed: int, clients: int = 7, size: int = P) -> tuple[Replies, Tensor]:
    """Replies and a shared vector; two of the clients lie apart, and weights are no round numbers."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, size))
    points[:2] += 8 * generator.normal(size=(1, size))
    weights = generator.uniform(0.1, 2.0, clients).tolist()
    fishers = torch.from_numpy(generator.exponential(size=(clients, size))).float()
    shared = torch.from_numpy(generator.normal(size=size)).float()
    return replies(torch.from_numpy(points).float(), weights, fishers), shared


# What holds for every rule


ALL = {**RULES, "multi-krum": partial(krum, byzantine=2, keep=3), "huber": partial(huber, threshold=0.7)}
every_rule = pytest.mark.parametrize("rule", ALL.values(), ids=ALL.keys())
Rule = Callable[[Replies, Tensor, Groups], Merged]


@every_rule
def test_the_order_of_arrival_changes_not_a_bit(rule: Rule) -> None:
    for seed in range(10):
        given_, shared = some(seed)
        expected = rule(given_, shared, GROUPS)
        shuffled = list(given_.all)
        np.random.default_rng(seed).shuffle(shuffled)  # type: ignore[arg-type]
        found = rule(Replies.of(shuffled), shared, GROUPS)
        assert bits(found.point) == bits(expected.point)
        assert torch.equal(found.departed, expected.departed)
        assert torch.equal(found.deviations, expected.deviations)
        assert found.clients == expected.clients == tuple(f"c0{number}" for number in range(7))


@every_rule
def test_a_client_without_weight_changes_not_a_bit_wherever_it_lies(rule: Rule) -> None:
    for seed, far in itertools.product(range(5), (1.0, 1e12)):
        given_, shared = some(seed)
        expected = rule(given_, shared, GROUPS)
        ghost = Reply("c03a", torch.full((P,), far), 0.0, torch.full((P,), far))
        found = rule(Replies.of([*given_.all, ghost]), shared, GROUPS)
        assert found.clients[4] == "c03a"
        rest = [0, 1, 2, 3, 5, 6, 7]
        assert bits(found.point) == bits(expected.point)
        assert torch.equal(found.departed[rest], expected.departed)
        torch.testing.assert_close(found.deviations[rest], expected.deviations)


@every_rule
def test_one_client_alone_gets_back_what_it_sent(rule: Rule) -> None:
    point = torch.tensor([0.1, -0.0, 1e-30, 3e30, *torch.randn(P - 4).tolist()])
    alone = replies(point[None], [0.3], torch.rand(1, P) + 0.1)
    assert torch.equal(rule(alone, torch.zeros(P), GROUPS).point, point)


@every_rule
def test_the_shared_vector_stays_if_nobody_has_a_weight(rule: Rule) -> None:
    shared = torch.randn(P)
    for given_ in (replies(torch.randn(3, P), [0.0] * 3, torch.rand(3, P)), Replies(())):
        merged = rule(given_, shared, GROUPS)
        assert bits(merged.point) == bits(shared)
        assert merged.deviations.shape == (len(given_.all), 3)


@every_rule
def test_deviations_are_distances_from_what_a_client_is_merged_into(rule: Rule) -> None:
    given_, shared = some(1)
    merged = rule(given_, shared, GROUPS)
    for number, reply in enumerate(given_.all):
        into = merged.point if merged.clusters is None else merged.clusters.point(number)
        norms = [(reply.point - into)[GROUPS.ids == group].norm() for group in range(3)]
        torch.testing.assert_close(merged.deviations[number], torch.stack(norms))


@every_rule
def test_replies_are_not_written_to(rule: Rule) -> None:
    given_, shared = some(2)
    before = [reply.point.clone() for reply in given_.all]
    rule(given_, shared, GROUPS)
    assert all(torch.equal(reply.point, point) for reply, point in zip(given_.all, before, strict=True))


# Distances


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), SEEDS)
def test_distances_however_the_groups_lie(ids: list[int], seed: int) -> None:
    numbers = {group: number for number, group in enumerate(sorted(set(ids) - {-1}))}
    if not numbers:
        return
    groups = groups_by([numbers.get(group, -1) for group in ids])
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, len(ids)))).float()
    centre = points.mean(0)
    expected = torch.stack([(points - centre)[:, groups.ids == g].double().norm(dim=1) for g in range(len(numbers))], 1)
    torch.testing.assert_close(distances(list(points), centre, groups), expected, rtol=1e-6, atol=1e-7)


def test_distances_of_more_clients_than_fit_into_the_buffer() -> None:
    ids = np.arange(40_000) // 100 % 7
    points = torch.randn(40, 40_000)
    groups = groups_by(ids.tolist())
    expected = torch.stack([points[:, groups.ids == g].double().norm(dim=1) for g in range(7)], 1)
    torch.testing.assert_close(distances(list(points), torch.zeros(40_000), groups), expected, rtol=1e-6, atol=0.0)


# Means


def test_a_mean_by_hand() -> None:
    points = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, P)
    merged = mean(replies(points, [1.0, 1.0, 2.0]), torch.zeros(P), GROUPS)
    assert merged.point.tolist() == [2.75] * P
    assert not merged.departed.any()
    torch.testing.assert_close(merged.deviations[2], torch.tensor([2.5, 2.5, 1.25 * 2**0.5]))


@given(SEEDS, st.integers(1, 9))
def test_the_mean_is_fedavg_bit_for_bit(seed: int, clients: int) -> None:
    """Weights that are counts, as FedAvg's: sums in float64 in the order of names, one division, then float32."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, P)).astype(np.float32)
    counts = generator.integers(1, 5000, clients)
    total = np.zeros(P)
    for point, count in zip(points, counts, strict=True):
        total = total + float(count) * point.astype(np.float64)
    expected = torch.from_numpy((total / float(counts.sum())).astype(np.float32))
    found = mean(replies(torch.from_numpy(points), [float(count) for count in counts]), torch.zeros(P), GROUPS).point
    assert bits(found) == bits(expected)


def test_clients_who_agree_are_left_as_they_are_to_the_bit() -> None:
    point = torch.tensor([-0.0, 1e-40, 3e38, *torch.randn(P - 3).tolist()])
    assert bits(mean(replies(point.expand(5, P), [0.1, 0.2, 0.3, 0.7, 1.1]), torch.zeros(P), GROUPS).point) == bits(
        point
    )


def test_streaming_gives_the_bits_of_the_batch() -> None:
    given_, shared = some(3)
    plain, weighted = StreamingMean(), StreamingFisher()
    for reply in given_.all:
        assert reply.fisher is not None
        plain.add(reply.point, reply.weight)
        weighted.add(reply.point, reply.weight, reply.fisher)
    for stream, rule in ((plain, mean), (weighted, fisher)):
        point = stream.result()
        assert point is not None
        assert bits(point) == bits(rule(given_, shared, GROUPS).point)


def test_streaming_remembers_one_model_however_many_reply() -> None:
    plain, weighted = StreamingMean(), StreamingFisher()
    for number in range(50):
        point = torch.full((P,), float(number))
        plain.add(point, 1.0)
        weighted.add(point, 1.0, torch.ones(P))
    assert held(plain) == P
    assert held(weighted) == 3 * P  # the sum, the Fisher, and the mean for where no Fisher says anything
    assert plain.result().tolist() == [24.5] * P  # type: ignore[union-attr]


def held(stream: StreamingMean | StreamingFisher) -> int:
    """Numbers that it keeps."""
    values = list(vars(stream).values())
    inner = sum(held(value) for value in values if isinstance(value, StreamingMean))
    return inner + sum(value.numel() for value in values if isinstance(value, Tensor))


def test_a_stream_without_replies_has_no_result() -> None:
    assert StreamingMean().result() is None
    assert StreamingFisher().result() is None


def test_a_weight_must_be_a_number_that_is_not_negative() -> None:
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(AssertionError):
            Reply("c", torch.zeros(P), wrong)


# Fisher


def test_a_fisher_mean_by_hand() -> None:
    """Weights 1 and 2 times Fishers: 1 and 1 give (0 + 2 * 3) / 3, 4 and 1 give 6 / 6, and 0 and 0 the plain mean 2."""
    points = torch.tensor([[0.0] * 3, [3.0] * 3])
    fishers = torch.tensor([[1.0, 4.0, 0.0], [1.0, 1.0, 0.0]])
    merged = fisher(replies(points, [1.0, 2.0], fishers), torch.zeros(3), groups_by([0, 0, 0]))
    assert merged.point.tolist() == [2.0, 1.0, 2.0]


def test_where_one_fisher_alone_says_something_its_client_alone_is_followed() -> None:
    points, fishers = torch.randn(3, P), torch.zeros(3, P)
    fishers[1] = 1e-20
    torch.testing.assert_close(fisher(replies(points, None, fishers), torch.zeros(P), GROUPS).point, points[1])


def test_the_fisher_mean_is_the_minimum_of_the_clients_quadratic_forms() -> None:
    """Their weighted sum, w (theta - s)' F (theta - s) each, has no slope there."""
    given_, shared = some(4)
    point = fisher(given_, shared, GROUPS).point.double()
    slope = sum(r.weight * r.fisher.double() * (point - r.point) for r in given_.all if r.fisher is not None)
    torch.testing.assert_close(slope, torch.zeros(P, dtype=torch.float64), atol=1e-5, rtol=0.0)


# The group lasso between clients


def test_the_group_lasso_by_hand() -> None:
    """With tau = 0.5 * sqrt(4) = 1. Three near clients are pulled by one far one: 3 |s| = 1."""
    points = torch.zeros(4, 4)
    points[3, 1] = 10.0
    merged = huber(replies(points), torch.zeros(4), groups_by([0] * 4), threshold=0.5, refit=False)
    torch.testing.assert_close(merged.point, torch.tensor([0.0, 1 / 3, 0.0, 0.0]))
    assert merged.departed[:, 0].tolist() == [False, False, False, True]
    torch.testing.assert_close(merged.deviations[:, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 10 - 1 / 3]))


@pytest.mark.parametrize("far", [10.0, 1e3, 1e6, 1e9, 1e15, 1e30])
def test_the_pull_of_a_departed_client_is_bounded(far: float) -> None:
    """By its weight times tau, and in its own direction, wherever it goes: 2 * 1 / (3 + 5)."""
    points = torch.full((3, 4), 0.3)
    points[0, 0] = far
    given_ = replies(points, [2.0, 3.0, 5.0])
    merged = huber(given_, torch.zeros(4), groups_by([0] * 4), threshold=0.5, refit=False)
    torch.testing.assert_close(merged.point, torch.tensor([0.55, 0.3, 0.3, 0.3]))
    assert merged.departed[:, 0].tolist() == [True, False, False]


@pytest.mark.parametrize("heavier", [1.001, 1.1, 3.0])
def test_of_two_who_disagree_the_heavier_is_followed(heavier: float) -> None:
    """The bottom is nearly flat between them; it ends where heavier * |s - theta| = tau. Both directions of weights."""
    points = torch.tensor([[0.0], [100.0]])
    for weights, expected in (([heavier, 1.0], 1 / heavier), ([1.0, heavier], 100 - 1 / heavier)):
        merged = huber(replies(points, weights), torch.zeros(1), groups_by([0]), threshold=1.0, refit=False)
        torch.testing.assert_close(merged.point, torch.tensor([expected]), rtol=1e-4, atol=1e-4)


def test_after_the_refit_a_departed_client_does_not_pull() -> None:
    """Those who stay, of weights 3 and 5, have the mean (3 * 0.2 + 5 * 0.6) / 8; the others' deviations are from it."""
    points = torch.zeros(4, 4)
    points[:, 0] = torch.tensor([0.2, 0.6, 10.0, -7.0])
    given_ = replies(points, [3.0, 5.0, 2.0, 1.0])
    merged = huber(given_, torch.zeros(4), groups_by([0] * 4), threshold=0.5)
    torch.testing.assert_close(merged.point, torch.tensor([0.45, 0.0, 0.0, 0.0]))
    assert merged.departed[:, 0].tolist() == [False, False, True, True]
    torch.testing.assert_close(merged.deviations[:, 0], torch.tensor([0.25, 0.15, 9.55, 7.45]))


def test_the_refit_changes_nothing_of_who_departs_and_nothing_where_nobody_stays() -> None:
    """Each group with its own stayers, and one that all leave: two far from each other and from where they meet."""
    points = torch.zeros(3, 4)
    points[2, 0], points[1, 1] = 10.0, 20.0
    points[:, 2] = torch.tensor([-50.0, 0.5, 60.0])
    for refit, expected in ((False, [0.5, 0.5]), (True, [0.0, 0.0])):
        merged = huber(replies(points), torch.zeros(4), groups_by([0, 1, 2, 3]), threshold=1.0, refit=refit)
        torch.testing.assert_close(merged.point[:2], torch.tensor(expected))
        assert merged.departed.T.tolist() == [
            [False, False, True],
            [False, True, False],
            [True, False, True],
            [False, False, False],
        ]
    everybody = torch.tensor([[-50.0], [50.0]])
    with_, without = (
        huber(replies(everybody), torch.zeros(1), groups_by([0]), threshold=1.0, refit=refit) for refit in (True, False)
    )
    assert with_.departed.all()
    assert bits(with_.point) == bits(without.point)


@given(SEEDS)
def test_with_an_infinite_threshold_it_is_the_mean_bit_for_bit(seed: int) -> None:
    given_, shared = some(seed)
    merged = huber(given_, shared, GROUPS, threshold=float("inf"))
    assert bits(merged.point) == bits(mean(given_, shared, GROUPS).point)
    assert not merged.departed.any()


@given(SEEDS)
def test_with_no_threshold_everybody_departs_with_everything(seed: int) -> None:
    given_, shared = some(seed)
    merged = huber(given_, shared, GROUPS, threshold=0.0)
    assert merged.departed.all()
    grouped = GROUPS.ids >= 0
    assert bits(merged.point[grouped]) == bits(shared[grouped])
    assert bits(merged.point[~grouped]) == bits(mean(given_, shared, GROUPS).point[~grouped])


def test_with_no_threshold_even_one_departs_who_never_moved() -> None:
    assert huber(replies(torch.ones(3, P)), torch.ones(P), GROUPS, threshold=0.0).departed.all()


def huber_cost(s: np.ndarray, points: np.ndarray, weights: np.ndarray, tau: float) -> tuple[float, np.ndarray]:
    """What the group lasso minimises for one group, with the best delta for each client put in, and its slope."""
    apart = points - s
    shrunk = apart * np.maximum(0.0, 1 - tau / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-300))
    left = apart - shrunk
    value = 0.5 * (left**2).sum(1) + tau * np.linalg.norm(shrunk, axis=1)
    return float(weights @ value), -weights @ left


@given(SEEDS, st.integers(2, 8), st.integers(1, 12), st.floats(-3.0, 1.5))
def test_the_group_lasso_is_solved(seed: int, clients: int, size: int, log_threshold: float) -> None:
    """As well as by quasi-Newton steps; clients lie at all distances, and the threshold anywhere among them."""
    generator = np.random.default_rng(seed)
    scale = np.exp(generator.normal(size=(clients, 1)))
    points = (generator.normal(size=(clients, size)) * scale).astype(np.float32)
    weights = generator.choice([0.5, 1.0, 1.0, 2.0], clients)
    threshold = float(np.exp(log_threshold))
    tau = threshold * size**0.5
    given_ = replies(torch.from_numpy(points), weights.tolist())
    merged = huber(given_, torch.zeros(size), groups_by([0] * size), threshold=threshold, refit=False)
    problem = (points.astype(np.float64), weights, tau)
    ours, slope = huber_cost(merged.point.double().numpy(), *problem)
    theirs = minimize(huber_cost, points.mean(0).astype(np.float64), problem, "L-BFGS-B", jac=True, tol=1e-14)
    assert ours <= theirs.fun * (1 + 1e-9) + 1e-12
    assert np.linalg.norm(slope) <= 1e-5 * weights.sum() * tau
    assert torch.equal(merged.departed[:, 0], merged.deviations[:, 0] > tau)


def test_the_group_lasso_is_solved_where_parameters_are_fewer_than_clients_and_where_they_are_more() -> None:
    """The same clients, whose last parameters are all 0: those take part in nothing but the threshold."""
    generator = np.random.default_rng(0)
    points = torch.zeros(12, 300)
    points[:, :3] = torch.from_numpy(generator.standard_t(1.5, size=(12, 3))).float()
    few = huber(replies(points[:, :3]), torch.zeros(3), groups_by([0] * 3), threshold=1.5 / 3**0.5)
    many = huber(replies(points), torch.zeros(300), groups_by([0] * 300), threshold=1.5 / 300**0.5)
    assert 0 < few.departed.sum() < 12
    assert torch.equal(few.departed, many.departed)
    torch.testing.assert_close(few.point, many.point[:3], rtol=1e-6, atol=1e-6)


def test_groups_do_not_know_of_each_other() -> None:
    """Merged together or each alone; groups of unlike sizes that lie scattered, some with departures."""
    generator = np.random.default_rng(5)
    ids = generator.permutation(np.repeat([0, 1, 2, 3], [5, 5, 30, 200])).tolist()
    points = torch.from_numpy(generator.normal(size=(9, 240)) * np.exp(generator.normal(size=(9, 1)))).float()
    shared = torch.zeros(240)
    together = huber(replies(points), shared, groups_by(ids), threshold=1.0)
    assert together.departed.any()
    assert not together.departed.all()
    for group in range(4):
        columns = torch.tensor(ids) == group
        size = int(columns.sum())
        alone = huber(replies(points[:, columns]), shared[columns], groups_by([0] * size), threshold=1.0)
        torch.testing.assert_close(together.point[columns], alone.point, rtol=1e-6, atol=1e-6)
        assert torch.equal(together.departed[:, group], alone.departed[:, 0])


def test_a_group_nobody_leaves_has_the_bits_of_the_mean_though_others_are_left() -> None:
    given_, shared = some(6)
    points = torch.stack([reply.point for reply in given_.all])
    points[0, :4] += 100.0
    points[:, 4:8] *= 1e-3
    given_ = replies(points, [reply.weight for reply in given_.all])
    merged = huber(given_, shared, GROUPS, threshold=1.0)
    assert merged.departed[0, 0]
    assert not merged.departed[:, 1].any()
    calm = [4, 5, 6, 7, 10, 11]
    assert bits(merged.point[calm]) == bits(mean(given_, shared, GROUPS).point[calm])


def test_a_few_far_ones_do_not_make_the_others_depart() -> None:
    """Six of twenty lie 1000 away, so the mean lies 300 from the fourteen others, whose threshold is 1 all the same."""
    generator = np.random.default_rng(7)
    points = torch.from_numpy(0.1 * generator.normal(size=(20, 4))).float()
    points[:6] += 500.0
    merged = huber(replies(points), torch.zeros(4), groups_by([0] * 4), threshold=0.5)
    assert merged.departed[:, 0].tolist() == [True] * 6 + [False] * 14


def test_blocks_have_thresholds_of_their_own() -> None:
    tau = group_thresholds(GROUPS, 0.5, {"b": 3.0})
    torch.testing.assert_close(tau, torch.tensor([1.0, 1.0, 3 * 2**0.5], dtype=torch.float64))
    points = torch.zeros(4, P)
    points[3, [0, 8]] = 4.0  # more than 1, less than 3 sqrt(2)
    merged = huber(replies(points), torch.zeros(P), GROUPS, threshold=0.5, blocks={"b*": 3.0})
    assert merged.departed[3].tolist() == [True, False, False]


def test_a_pattern_that_matches_no_block_or_matches_one_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r'merge.blocks: "critic" matches no block; there are \["a", "b"\]'):
        group_thresholds(GROUPS, 0.5, {"critic": 3.0})
    with pytest.raises(ValueError, match=r'merge.blocks: "\*" and "a" both match "a"; narrow one of the patterns'):
        group_thresholds(GROUPS, 0.5, {"*": 3.0, "a": 1.0})


# Robust rules


@given(SEEDS, st.integers(1, 9))
def test_the_median_is_numpys(seed: int, clients: int) -> None:
    points = np.random.default_rng(seed).normal(size=(clients, P)).astype(np.float32)
    found = median(replies(torch.from_numpy(points)), torch.zeros(P), GROUPS).point
    assert bits(found) == bits(torch.from_numpy(np.median(points.astype(np.float64), axis=0)).float())


@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=7))
def test_a_weight_is_worth_as_many_clients(seed: int, counts: list[int]) -> None:
    """Also of weights of another scale, which are not exact."""
    points = np.random.default_rng(seed).normal(size=(len(counts), P)).astype(np.float32)
    repeated = np.repeat(points, counts, axis=0).astype(np.float64)
    for scale in (1.0, 0.1):
        given_ = replies(torch.from_numpy(points), [scale * count for count in counts])
        found = median(given_, torch.zeros(P), GROUPS).point
        torch.testing.assert_close(found.double(), torch.from_numpy(np.median(repeated, axis=0)))
        found = trimmed_mean(given_, torch.zeros(P), GROUPS, fraction=1 / 4).point
        quarters = trim_mean(np.repeat(repeated, 4, axis=0), 1 / 4)
        torch.testing.assert_close(found.double(), torch.from_numpy(quarters), rtol=1e-5, atol=1e-6)


def test_a_trimmed_mean_by_hand() -> None:
    """A fraction of 0.3 of five clients cuts one and a half: (0.5 * 2 + 3 + 0.5 * 4) / 2; with none it is the mean."""
    points = torch.tensor([[5.0], [1.0], [3.0], [2.0], [1e9]]).expand(5, P)
    cut = trimmed_mean(replies(points), torch.zeros(P), GROUPS, fraction=0.3)
    torch.testing.assert_close(cut.point, torch.full((P,), (0.5 * 2 + 3 + 0.5 * 5) / 2))
    given_, shared = some(8)
    whole = trimmed_mean(given_, shared, GROUPS, fraction=0.0)
    assert bits(whole.point) == bits(mean(given_, shared, GROUPS).point)


def test_the_sorted_rules_go_through_more_parameters_than_they_sort_at_a_time() -> None:
    points = torch.randn(3, 400_000)
    groups = groups_by([0] * 400_000)
    found = median(replies(points), torch.zeros(400_000), groups).point
    assert torch.equal(found, points.median(0).values)


def test_krum_by_hand() -> None:
    """Seven on a line, two byzantine: three nearest count, and 24 has 1 + 9 + 36, 25 has 1 + 4 + 49, 27 has 4 + 9 + 81.

    With two nearest 25 would win, and with four 18.
    """
    line = replies(torch.tensor([[2.0], [4.0], [8.0], [18.0], [24.0], [25.0], [27.0]]))
    one = krum(line, torch.zeros(1), groups_by([0]), byzantine=2)
    assert (one.point.item(), one.notes) == (24.0, ("krum: kept c04",))
    three = krum(line, torch.zeros(1), groups_by([0]), byzantine=2, keep=3)
    assert three.point.item() == pytest.approx(76 / 3)
    assert three.notes == ("krum: kept c04, c05, c06",)


def test_krum_never_follows_the_hostile() -> None:
    """Two of seven, together or each for itself, near or far."""
    for seed, far, together in itertools.product(range(10), (20.0, 1e8), (True, False)):
        generator = np.random.default_rng(seed)
        points = generator.normal(size=(7, P))
        points[[1, 4]] += far * generator.normal(size=(1 if together else 2, P))
        merged = krum(replies(torch.from_numpy(points).float()), torch.zeros(P), GROUPS, byzantine=2, keep=3)
        assert not {"c01", "c04"} & set(merged.notes[0].removeprefix("krum: kept ").split(", "))


def test_krum_says_when_it_can_promise_nothing() -> None:
    merged = krum(replies(torch.randn(4, P)), torch.zeros(P), GROUPS, byzantine=1)
    assert merged.notes[1] == "krum: 4 replies; against 1 byzantine it needs 5"


# Clusters


def two_kinds(seed: int = 0, clients: int = 10) -> Tensor:
    """[K, P]: in block a the first four differ from the rest, in block b there is no structure."""
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, P))).float()
    points[:4, :8] += 12.0
    return points


def test_clients_of_a_kind_share_a_mean_in_the_block_that_tells_them_apart() -> None:
    points = two_kinds()
    merged = clusters(replies(points), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert merged.clusters.blocks == ("a", "b")
    assert merged.clusters.members.T.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 10]
    for client, kind in ((0, slice(0, 4)), (9, slice(4, 10))):
        own = merged.clusters.point(client)
        torch.testing.assert_close(own[:8], points[kind, :8].mean(0))
        assert bits(own[8:]) == bits(mean(replies(points), torch.zeros(P), GROUPS).point[8:])
    assert torch.equal(merged.point, merged.clusters.point(9))
    assert not merged.departed.any()


def test_the_cluster_of_most_weight_is_the_first() -> None:
    weights = [10.0] * 4 + [1.0] * 6
    merged = clusters(replies(two_kinds(), weights), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert merged.clusters.members[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_one_without_weight_joins_the_nearest_cluster() -> None:
    weights = [0.0, 1.0, 1.0, 1.0, 0.0] + [1.0] * 5
    merged = clusters(replies(two_kinds(), weights), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert merged.clusters.members[:, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("clients", [2, 3, 6, 20])
def test_where_there_is_no_structure_there_is_one_cluster_and_the_mean_bit_for_bit(clients: int) -> None:
    groups = groups_by([0] * 20 + [1] * 40)
    for seed in range(20):
        given_, shared = some(seed, clients, 60)
        points = torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, 60))).float()
        given_ = replies(points, [reply.weight for reply in given_.all])
        merged = clusters(given_, shared, groups)
        assert merged.clusters is not None
        assert not merged.clusters.members.any()
        assert bits(merged.point) == bits(mean(given_, shared, groups).point)


def test_clients_who_agree_are_one_cluster() -> None:
    merged = clusters(replies(torch.ones(5, P)), torch.zeros(P), GROUPS)
    assert merged.clusters is not None
    assert not merged.clusters.members.any()


def test_three_kinds_are_three_clusters_unless_fewer_are_allowed() -> None:
    points = torch.zeros(9, P)
    points[:, 0] = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.2, 30.0, 30.1, 30.2])
    for most, expected in ((8, [0, 0, 0, 1, 1, 1, 2, 2, 2]), (2, [0, 0, 0, 0, 0, 0, 1, 1, 1])):
        merged = clusters(replies(points), torch.zeros(P), GROUPS, most=most)
        assert merged.clusters is not None
        assert merged.clusters.members[:, 0].tolist() == expected


def test_clusters_lie_further_apart_than_the_threshold_or_are_one() -> None:
    # In block a of 8 the kinds are 4 apart at one parameter: a root mean square of 4 / sqrt(8) = 1.414.
    points = torch.zeros(6, P)
    points[3:, 0] = 4.0
    for threshold, kinds in ((0.0, 2), (1.41, 2), (1.42, 1), (math.inf, 1)):
        merged = clusters(replies(points), torch.zeros(P), GROUPS, threshold=threshold)
        assert merged.clusters is not None
        assert len(merged.clusters.members[:, 0].unique()) == kinds
    merged = clusters(replies(points), torch.zeros(P), GROUPS, threshold=math.inf, blocks={"a": 1.0})
    assert merged.clusters is not None
    assert len(merged.clusters.members[:, 0].unique()) == 2


def test_a_few_tiny_steps_are_no_clusters_by_chance() -> None:
    """Of six points drawn alike some seeds divide by the silhouette alone, which does not see how near they lie."""
    divided = {0.0: 0, 0.02: 0}
    for seed in range(60):
        points = torch.from_numpy(np.random.default_rng(seed).normal(size=(6, P)) * 1e-3).float()
        points[:, 2:] = 0.0
        for threshold in divided:
            merged = clusters(replies(points), torch.zeros(P), GROUPS, threshold=threshold)
            assert merged.clusters is not None
            divided[threshold] += bool(merged.clusters.members.any())
    assert divided[0.0] > 10
    assert divided[0.02] == 0


def naive_silhouette(apart: np.ndarray, labels: list[int]) -> float:
    """Rousseeuw's definition, client by client."""
    scores = []
    for client, label in enumerate(labels):
        others = {
            other: np.mean([apart[client, i] for i, own in enumerate(labels) if own == other and i != client])
            for other in set(labels)
            if other != label or labels.count(label) > 1
        }
        a, b = others.get(label), min(value for other, value in others.items() if other != label)
        scores.append(0.0 if a is None else (b - a) / max(a, b))
    return float(np.mean(scores))


@given(SEEDS, st.integers(4, 9), st.integers(2, 4))
def test_divisions_are_scipys_and_the_best_by_rousseeuws_silhouette(seed: int, clients: int, kinds: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, 3)) + 3 * generator.normal(size=(kinds, 3))[np.arange(clients) % kinds]
    apart = cdist(points, points)
    tree = linkage(points, "average")
    divisions = [fcluster(tree, count, "maxclust").tolist() for count in range(2, clients)]
    scores = [naive_silhouette(apart, labels) for labels in divisions]
    for labels, score in zip(divisions, scores, strict=True):
        assert silhouette(torch.from_numpy(apart), torch.tensor(labels)) == pytest.approx(score)
    found = cluster_clients(torch.from_numpy(apart), 0.0, clients).tolist()
    best = divisions[int(np.argmax(scores))]
    assert len(set(zip(found, best, strict=True))) == len(set(best)) == len(set(found))


# Weights


def test_weights_by_hand() -> None:
    effort = ClientWork(steps=2048, episodes=31, gain=3.0, spread=1.5)
    assert client_weight(effort, "uniform") == 1.0
    assert client_weight(effort, "steps") == 2048.0
    assert client_weight(effort, "episodes") == 31.0
    assert client_weight(effort, "progress") == pytest.approx(1 / (1 + np.exp(-2.0)))


def test_progress_is_counted_in_the_clients_own_units_and_within_limits() -> None:
    def progress(gain: float, spread: float) -> float:
        return client_weight(ClientWork(1, 1, gain, spread), "progress")

    assert progress(30.0, 15.0) == pytest.approx(progress(3.0, 1.5))
    assert progress(0.0, 1.0) == progress(0.0, 0.0) == 0.5
    assert progress(1e30, 1.0) == progress(1e30, 0.0) == progress(1.0, 0.0) == 1.0
    assert progress(-1e30, 1.0) == progress(-1.0, 0.0) == 0.0
