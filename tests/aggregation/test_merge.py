"""Merge rules: what holds for every rule, distances, means and weights, against numbers by hand and exact promises."""

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    fisher,
    huber,
    krum,
    mean,
)
from grpo_fed.aggregation.merge.distances import distances
from grpo_fed.aggregation.merge.mixing import with_mixing
from grpo_fed.policy.groups import Groups
from tests.support.merge_replies import GROUPS, P, bits, make_groups, make_replies, random_replies

SEEDS = st.integers(0, 2**32 - 1)

# What holds for every rule

ALL = {
    **RULES,
    "krum 3": partial(krum, byzantine=2, keep=3),
    "huber": partial(huber, threshold=0.7),
    "mixed": with_mixing(mean, 2),
}
every_rule = pytest.mark.parametrize("rule", ALL.values(), ids=ALL.keys())
Rule = Callable[[Replies, Tensor, Groups], Merged]


@every_rule
def test_the_order_of_arrival_changes_no_bit(rule: Rule) -> None:
    for seed in range(10):
        replies, shared = random_replies(seed)
        expected = rule(replies, shared, GROUPS)
        shuffled = list(replies.all)
        np.random.default_rng(seed).shuffle(shuffled)  # type: ignore[arg-type]
        merged = rule(Replies.of(shuffled), shared, GROUPS)
        assert bits(merged.point) == bits(expected.point)
        assert torch.equal(merged.departed, expected.departed)
        assert torch.equal(merged.deviations, expected.deviations)
        assert merged.clients == expected.clients == tuple(f"c0{number}" for number in range(7))


@every_rule
def test_a_client_without_weight_changes_no_bit(rule: Rule) -> None:
    for seed, far in itertools.product(range(5), (1.0, 1e12)):
        replies, shared = random_replies(seed)
        expected = rule(replies, shared, GROUPS)
        weightless = Reply("c03a", torch.full((P,), far), 0.0, torch.full((P,), far))
        merged = rule(Replies.of([*replies.all, weightless]), shared, GROUPS)
        assert merged.clients[4] == "c03a"
        rest = [0, 1, 2, 3, 5, 6, 7]
        assert bits(merged.point) == bits(expected.point)
        assert torch.equal(merged.departed[rest], expected.departed)
        torch.testing.assert_close(merged.deviations[rest], expected.deviations)


@every_rule
def test_a_single_client_gets_its_own_parameters_back(rule: Rule) -> None:
    point = torch.tensor([0.1, -0.0, 1e-30, 3e30, *torch.randn(P - 4).tolist()])
    alone = make_replies(point[None], [0.3], torch.rand(1, P) + 0.1)
    assert torch.equal(rule(alone, torch.zeros(P), GROUPS).point, point)


@every_rule
def test_the_shared_vector_stays_if_no_client_has_weight(rule: Rule) -> None:
    shared = torch.randn(P)
    for replies in (make_replies(torch.randn(3, P), [0.0] * 3, torch.rand(3, P)), Replies(())):
        merged = rule(replies, shared, GROUPS)
        assert bits(merged.point) == bits(shared)
        assert merged.deviations.shape == (len(replies.all), 3)


@every_rule
def test_deviations_are_distances_from_the_clients_merged_point(rule: Rule) -> None:
    replies, shared = random_replies(1)
    merged = rule(replies, shared, GROUPS)
    for number, reply in enumerate(replies.all):
        into = merged.point if merged.clusters is None else merged.clusters.point(number)
        norms = [(reply.point - into)[GROUPS.ids == group].norm() for group in range(3)]
        torch.testing.assert_close(merged.deviations[number], torch.stack(norms))


@every_rule
def test_rules_do_not_change_the_replies(rule: Rule) -> None:
    replies, shared = random_replies(2)
    before = [reply.point.clone() for reply in replies.all]
    rule(replies, shared, GROUPS)
    assert all(torch.equal(reply.point, point) for reply, point in zip(replies.all, before, strict=True))


# Distances


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), SEEDS)
def test_distances_are_exact_for_any_order_of_columns(ids: list[int], seed: int) -> None:
    numbers = {group: number for number, group in enumerate(sorted(set(ids) - {-1}))}
    if not numbers:
        return
    groups = make_groups([numbers.get(group, -1) for group in ids])
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, len(ids)))).float()
    centre = points.mean(0)
    expected = torch.stack([(points - centre)[:, groups.ids == g].double().norm(dim=1) for g in range(len(numbers))], 1)
    torch.testing.assert_close(distances(list(points), centre, groups), expected, rtol=1e-6, atol=1e-7)


def test_distances_are_exact_for_more_clients_than_the_buffer_holds() -> None:
    ids = np.arange(40_000) // 100 % 7
    points = torch.randn(40, 40_000)
    groups = make_groups(ids.tolist())
    expected = torch.stack([points[:, groups.ids == g].double().norm(dim=1) for g in range(7)], 1)
    torch.testing.assert_close(distances(list(points), torch.zeros(40_000), groups), expected, rtol=1e-6, atol=0.0)


# Means


def test_a_mean_by_hand() -> None:
    points = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, P)
    merged = mean(make_replies(points, [1.0, 1.0, 2.0]), torch.zeros(P), GROUPS)
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
    merged = mean(
        make_replies(torch.from_numpy(points), [float(count) for count in counts]), torch.zeros(P), GROUPS
    ).point
    assert bits(merged) == bits(expected)


def test_equal_replies_keep_their_bits() -> None:
    point = torch.tensor([-0.0, 1e-40, 3e38, *torch.randn(P - 3).tolist()])
    assert bits(
        mean(make_replies(point.expand(5, P), [0.1, 0.2, 0.3, 0.7, 1.1]), torch.zeros(P), GROUPS).point
    ) == bits(point)


def test_streaming_gives_the_bits_of_the_batch() -> None:
    replies, shared = random_replies(3)
    plain, weighted = StreamingMean(), StreamingFisher()
    for reply in replies.all:
        assert reply.fisher is not None
        plain.add(reply.point, reply.weight)
        weighted.add(reply.point, reply.weight, reply.fisher)
    for stream, rule in ((plain, mean), (weighted, fisher)):
        point = stream.result()
        assert point is not None
        assert bits(point) == bits(rule(replies, shared, GROUPS).point)


def test_streaming_memory_does_not_grow_with_the_replies() -> None:
    plain, weighted = StreamingMean(), StreamingFisher()
    for number in range(50):
        point = torch.full((P,), float(number))
        plain.add(point, 1.0)
        weighted.add(point, 1.0, torch.ones(P))
    assert count_numbers(plain) == P
    assert count_numbers(weighted) == 3 * P  # the sum, the Fisher, and the mean for where no Fisher says anything
    assert plain.result().tolist() == [24.5] * P  # type: ignore[union-attr]


def count_numbers(stream: StreamingMean | StreamingFisher) -> int:
    """Count the numbers that a stream keeps."""
    values = list(vars(stream).values())
    inner = sum(count_numbers(value) for value in values if isinstance(value, StreamingMean))
    return inner + sum(value.numel() for value in values if isinstance(value, Tensor))


def test_a_stream_without_replies_has_no_result() -> None:
    assert StreamingMean().result() is None
    assert StreamingFisher().result() is None


def test_a_weight_is_finite_and_not_negative() -> None:
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(AssertionError):
            Reply("c", torch.zeros(P), wrong)


# Fisher


def test_a_fisher_mean_by_hand() -> None:
    """The diagonals divided by their means 5/3 and 2/3 are 0.6, 2.4, 0 and 1.5, 1.5, 0. With weights 1 and 2 they give
    2 * 1.5 * 3 / (0.6 + 2 * 1.5) = 2.5 and 9 / (2.4 + 3) = 5/3; where both are 0, the plain mean 2.
    """
    points = torch.tensor([[0.0] * 3, [3.0] * 3])
    fishers = torch.tensor([[1.0, 4.0, 0.0], [1.0, 1.0, 0.0]])
    merged = fisher(make_replies(points, [1.0, 2.0], fishers), torch.zeros(3), make_groups([0, 0, 0]))
    assert merged.point.tolist() == pytest.approx([2.5, 5 / 3, 2.0])


def test_the_only_nonzero_fisher_decides_a_parameter() -> None:
    points, fishers = torch.randn(3, P), torch.zeros(3, P)
    fishers[1] = 1e-20
    torch.testing.assert_close(fisher(make_replies(points, None, fishers), torch.zeros(P), GROUPS).point, points[1])


def test_the_fisher_mean_minimises_the_clients_quadratic_forms() -> None:
    """Their weighted sum, w (theta - s)' F (theta - s) each, has no slope there; F has a mean of 1."""
    replies, shared = random_replies(4)
    point = fisher(replies, shared, GROUPS).point.double()
    diagonals = [(r, r.fisher.double()) for r in replies.all if r.fisher is not None]
    slope = sum(r.weight * (diagonal / diagonal.mean()).clamp(max=100) * (point - r.point) for r, diagonal in diagonals)
    torch.testing.assert_close(slope, torch.zeros(P, dtype=torch.float64), atol=1e-5, rtol=0.0)


# Weights


def test_weights_by_hand() -> None:
    work = ClientWork(steps=2048, episodes=31, gain=3.0, spread=1.5)
    assert client_weight(work, "uniform") == 1.0
    assert client_weight(work, "steps") == 2048.0
    assert client_weight(work, "episodes") == 31.0
    assert client_weight(work, "progress") == pytest.approx(1 / (1 + np.exp(-2.0)))


def test_progress_is_scaled_by_the_spread_and_bounded() -> None:
    def progress(gain: float, spread: float) -> float:
        return client_weight(ClientWork(1, 1, gain, spread), "progress")

    assert progress(30.0, 15.0) == pytest.approx(progress(3.0, 1.5))
    assert progress(0.0, 1.0) == progress(0.0, 0.0) == 0.5
    assert progress(1e30, 1.0) == progress(1e30, 0.0) == progress(1.0, 0.0) == 1.0
    assert progress(-1e30, 1.0) == progress(-1.0, 0.0) == 0.0
