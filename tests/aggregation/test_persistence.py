"""Departures by persistence, against sums over single rounds, clients and pairs that share no code with them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import Replies, Reply, mean
from grpo_fed.aggregation.merge.persistence import (
    MIN_ROUNDS,
    Evidence,
    add_round,
    no_evidence,
    persistence,
    systematic,
)
from grpo_fed.policy.groups import Groups

NAMES = ("a", "b", "c", "d", "e", "f")


def make_groups(sizes: list[int], blocks: list[str] | None = None) -> Groups:
    names = tuple(f"g{i}" for i in range(len(sizes)))
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Groups(names, ids, torch.tensor(sizes).float(), tuple(blocks or names))


def replies_at(points: dict[str, Tensor], weights: dict[str, float] | None = None) -> Replies:
    return Replies.of(Reply(name, point, (weights or {}).get(name, 1.0)) for name, point in points.items())


def run_rounds(
    rounds: int,
    update: object,
    groups: Groups,
    names: tuple[str, ...] = NAMES,
    ordered: bool = True,
    weights: dict[str, float] | None = None,
    scale: float = 1.0,
) -> tuple[Evidence, Tensor]:
    """Rounds in which each client's update is update(name, round), from where the last merge went."""
    shared, evidence = torch.zeros(len(groups.ids)), no_evidence(names, groups)
    for number in range(rounds):
        points = {name: shared + scale * update(name, number) for name in names}  # type: ignore[operator]
        merged, evidence, _ = persistence(replies_at(points, weights), shared, groups, evidence, ordered)
        shared = merged.point
    return evidence, shared


def departed(evidence: Evidence) -> dict[str, list[int]]:
    rows = zip(evidence.clients, evidence.departed.tolist(), strict=True)
    return {name: [group for group, left in enumerate(row) if left] for name, row in rows if any(row)}


# The statistic --------------------------------------------------------------------------------------------------------


def test_systematic_products_are_sums_over_pairs_of_different_rounds():
    groups, generator = make_groups([3, 2]), torch.Generator().manual_seed(0)
    taken = {"a": (0, 1, 2, 3), "b": (0, 2, 3), "c": (1, 3)}
    updates = {(name, r): torch.randn(5, generator=generator) for name, rounds in taken.items() for r in rounds}
    evidence = no_evidence(tuple(taken), groups)
    for r in range(4):
        points = {name: update for (name, at), update in updates.items() if at == r}
        evidence = add_round(evidence, replies_at(points), torch.zeros(5), groups)
    between, within = systematic(evidence, groups)

    def unit(name: str, r: int, group: int) -> Tensor:
        part = updates[name, r][groups.ids == group].double()
        return part / part.norm()

    for group, (j, left), (k, right) in itertools.product(range(2), enumerate(taken), enumerate(taken)):
        pairs = [(r, s) for r in taken[left] for s in taken[right] if r != s]
        products = [float(unit(left, r, group) @ unit(right, s, group)) for r, s in pairs]
        assert between[group, j, k] == pytest.approx(sum(products) / len(products), abs=1e-6)
        same = [r for r in taken[left] if r in taken[right]]
        products = [float(unit(left, r, group) @ unit(right, r, group)) for r in same]
        assert within[group, j, k] == pytest.approx(sum(products) / len(products), abs=1e-6)


def test_rho_is_1_for_a_steady_deviation_and_known_by_hand_for_a_turning_one():
    # b and c always go along x; a goes along y. So a's deviation from the mean (1, 0) is (-1, 1) in every round.
    groups = make_groups([2])
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    evidence = no_evidence(("a", "b", "c"), groups)
    for _ in range(MIN_ROUNDS):
        points = {"a": y, "b": 2 * x, "c": 3 * x}
        _, evidence, rho = persistence(replies_at(points), torch.zeros(2), groups, evidence)
    assert rho[0, 0] == pytest.approx(1.0)
    # Now a goes +y, -y, +y, -y: products of different rounds are -1 (8 of 12 ordered pairs) or +1 (4): M_aa = -1/3.
    evidence = no_evidence(("a", "b", "c"), groups)
    for number in range(MIN_ROUNDS):
        points = {"a": y * (-1) ** number, "b": 2 * x, "c": 3 * x}
        _, evidence, rho = persistence(replies_at(points), torch.zeros(2), groups, evidence)
    assert rho[0, 0] == pytest.approx((1 - 1 / 3) / 2), "b2 = |x|^2 + M_aa, v = |x|^2 + |y|^2"


# Who leaves -----------------------------------------------------------------------------------------------------------


def noisy(towards: dict[str, Tensor], noise: float, size: int, seed: int = 0) -> object:
    """Updates along a direction of each client's own, with noise that is new in every round."""

    def update(name: str, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 10_000 + number * 100 + ord(name))
        return towards[name] + noise * torch.randn(size, generator=generator)

    return update


def test_opposed_clients_leave_and_nobody_else():
    groups, up = make_groups([40, 40]), torch.ones(80) / 9
    contrary = up.clone()
    contrary[40:] *= -1
    towards = {name: contrary if name in "ef" else up for name in NAMES}
    for seed in range(5):
        evidence, _ = run_rounds(12, noisy(towards, 0.15, 80, seed), groups)
        assert departed(evidence) == {"e": [1], "f": [1]}


def test_clients_with_noise_alone_leave_nothing():
    groups = make_groups([20, 5, 1])
    for seed in range(10):
        evidence, _ = run_rounds(60, noisy(dict.fromkeys(NAMES, torch.zeros(26)), 1.0, 26, seed), groups)
        assert not departed(evidence)


def test_a_client_at_right_angles_to_the_others_is_not_set_back_and_stays():
    groups, x, y = make_groups([20]), torch.zeros(20), torch.zeros(20)
    x[:10], y[10:] = 0.3, 0.3
    evidence, _ = run_rounds(20, noisy({name: y if name == "f" else x for name in NAMES}, 0.1, 20), groups)
    assert not departed(evidence)


def test_clients_leave_no_group_before_the_least_number_of_rounds():
    groups, up = make_groups([20]), torch.ones(20)
    towards = {name: -up if name == "f" else up for name in NAMES}
    assert not departed(run_rounds(MIN_ROUNDS - 1, noisy(towards, 0.1, 20), groups)[0])
    assert departed(run_rounds(MIN_ROUNDS, noisy(towards, 0.1, 20), groups)[0]) == {"f": [0]}


def test_a_group_of_one_parameter_needs_more_rounds():
    # rounds x (rounds - 1) must reach 200: 15 x 14 is the first that does.
    groups, up = make_groups([1]), torch.ones(1)
    towards = {name: -up if name == "f" else up for name in NAMES}
    assert not departed(run_rounds(14, noisy(towards, 0.1, 1), groups)[0])
    assert departed(run_rounds(15, noisy(towards, 0.1, 1), groups)[0]) == {"f": [0]}


def test_the_block_nearest_the_input_is_blamed_where_blocks_have_an_order():
    groups, up = make_groups([20, 20, 20]), torch.ones(60) / 7
    towards = {name: -up if name == "f" else up for name in NAMES}
    assert departed(run_rounds(MIN_ROUNDS, noisy(towards, 0.05, 60), groups)[0]) == {"f": [0]}
    assert departed(run_rounds(MIN_ROUNDS, noisy(towards, 0.05, 60), groups, ordered=False)[0]) == {"f": [0, 1, 2]}


def test_all_groups_in_conflict_of_the_blamed_block_are_left_at_once():
    groups, up = make_groups([20, 20, 20, 20], ["torso", "torso", "torso", "actor"]), torch.ones(80) / 8
    contrary = up.clone()
    contrary[20:] *= -1
    towards = {name: contrary if name == "f" else up for name in NAMES}
    assert departed(run_rounds(MIN_ROUNDS, noisy(towards, 0.05, 80), groups)[0]) == {"f": [1, 2]}


def test_a_client_that_has_left_needs_twice_as_many_rounds_to_leave_again():
    groups, up = make_groups([20, 20]), torch.ones(40) / 6
    towards = {name: -up if name == "f" else up for name in NAMES}
    assert departed(run_rounds(MIN_ROUNDS + 2 * MIN_ROUNDS - 1, noisy(towards, 0.05, 40), groups)[0]) == {"f": [0]}
    assert departed(run_rounds(MIN_ROUNDS + 2 * MIN_ROUNDS, noisy(towards, 0.05, 40), groups)[0]) == {"f": [0, 1]}


# Promises -------------------------------------------------------------------------------------------------------------


def test_without_conflict_and_cut_the_merge_is_the_mean_to_the_bit():
    groups, generator = make_groups([30, 7]), torch.Generator().manual_seed(3)
    shared, evidence = torch.randn(37, generator=generator), no_evidence(NAMES, groups)
    for _ in range(8):
        direction = torch.randn(6, 37, generator=generator)
        points = {name: shared + row / row.norm() for name, row in zip(NAMES, direction, strict=True)}
        weights = {name: 1.0 + number for number, name in enumerate(NAMES)}
        merged, evidence, _ = persistence(replies_at(points, weights), shared, groups, evidence)
        assert torch.equal(merged.point, mean(replies_at(points, weights), shared, groups).point)
        shared = merged.point


def test_the_scale_of_updates_changes_nothing():
    groups, up = make_groups([40, 40]), torch.ones(80) / 9
    towards = {name: -up if name == "f" else up for name in NAMES}
    for scale in (1e-3, 1e3):
        evidence, shared = run_rounds(10, noisy(towards, 0.2, 80), groups, scale=scale)
        plain, reference = run_rounds(10, noisy(towards, 0.2, 80), groups)
        assert departed(evidence) == departed(plain)
        torch.testing.assert_close(shared / scale, reference, rtol=1e-3, atol=1e-5)


def test_one_clients_rate_changes_no_departure_of_the_others():
    groups, up = make_groups([40, 40]), torch.ones(80) / 9
    towards = {name: -up if name == "f" else up for name in NAMES}
    plain = noisy(towards, 0.2, 80)

    def ten_times(name: str, number: int) -> Tensor:
        return plain(name, number) * (10 if name == "a" else 1)  # type: ignore[operator]

    assert departed(run_rounds(10, ten_times, groups)[0]) == departed(run_rounds(10, plain, groups)[0])


def test_permuting_clients_changes_nothing():
    groups, up = make_groups([20, 20]), torch.ones(40) / 6
    towards = {name: -up if name == "f" else up for name in NAMES}
    update = noisy(towards, 0.2, 40)
    evidence, shared = run_rounds(9, update, groups)
    other, again = run_rounds(9, update, groups, names=("f", "c", "a", "e", "b", "d"))
    assert torch.equal(shared, again)
    assert departed(evidence) == departed(other)


def test_an_update_is_cut_to_twice_the_median_norm():
    # Norms 1, 1, 10: the median is 1, so the third counts as 2: (1 + 1 + 2) / 3 along x.
    groups, x = make_groups([2]), torch.tensor([1.0, 0.0])
    points = {"a": x, "b": x, "c": 10 * x}
    merged, _, _ = persistence(replies_at(points), torch.zeros(2), groups, no_evidence(("a", "b", "c"), groups))
    assert merged.point.tolist() == pytest.approx([4 / 3, 0.0])


def test_the_cut_and_the_departed_do_not_touch_what_is_in_no_group():
    groups = make_groups([2, 1])
    loose = Groups(groups.names[:1], torch.tensor([0, 0, -1]), groups.sizes[:1], groups.blocks[:1])
    points = {"a": torch.tensor([1.0, 0, 3]), "b": torch.tensor([1.0, 0, 3]), "c": torch.tensor([10.0, 0, 9])}
    merged, _, _ = persistence(replies_at(points), torch.zeros(3), loose, no_evidence(("a", "b", "c"), loose))
    assert merged.point.tolist() == pytest.approx([4 / 3, 0.0, 5.0])


def test_only_clients_that_replied_leave():
    groups, up = make_groups([20]), torch.ones(20)
    update = noisy({name: -up if name == "f" else up for name in NAMES}, 0.1, 20)
    evidence, shared = no_evidence(NAMES, groups), torch.zeros(20)
    for number in range(2 * MIN_ROUNDS):
        present = NAMES if number < MIN_ROUNDS - 1 else NAMES[:-1]  # f is away in the round in which it might leave
        points = {name: update(name, number) for name in present}  # type: ignore[operator]
        merged, evidence, _ = persistence(replies_at(points), shared, groups, evidence)
        assert merged.clients == present
    assert not departed(evidence)
    points = {name: update(name, 99) for name in NAMES}  # type: ignore[operator]
    merged, evidence, _ = persistence(replies_at(points), shared, groups, evidence)
    assert departed(evidence) == {"f": [0]}
    assert merged.departed[merged.clients.index("f"), 0]


def test_replies_that_did_not_move_do_not_cut_the_one_that_did():
    groups, x = make_groups([2]), torch.tensor([1.0, 0.0])
    points = {"a": torch.zeros(2), "b": torch.zeros(2), "c": 3 * x}
    merged, _, _ = persistence(replies_at(points), torch.zeros(2), groups, no_evidence(("a", "b", "c"), groups))
    assert merged.point.tolist() == pytest.approx([1.0, 0.0])


def test_clients_of_weight_0_do_not_drive_out_one_that_has_a_weight():
    groups, up = make_groups([20]), torch.ones(20)
    update = noisy({"a": up, "b": -up, "c": -up}, 0.1, 20)
    evidence, shared = run_rounds(8, update, groups, ("a", "b", "c"), weights={"a": 1.0, "b": 0.0, "c": 0.0})
    assert "a" not in departed(evidence)
    assert shared.mean() > 7


def test_a_client_of_weight_0_is_judged_but_moves_nothing():
    groups, up = make_groups([20]), torch.ones(20)
    towards = {name: -up if name == "f" else up for name in NAMES}
    weights = {name: float(name != "f") for name in NAMES}
    evidence, shared = run_rounds(1, noisy(towards, 0.01, 20), groups, weights=weights)
    assert shared.mean() == pytest.approx(1.0, abs=0.05)
    assert not departed(evidence)


def test_a_sketch_keeps_inner_products_to_its_stated_error(monkeypatch: pytest.MonkeyPatch):
    """A count sketch of m numbers has inner products of unit vectors with a standard error of about 1 / sqrt(m)."""
    from grpo_fed.aggregation.merge import persistence as module

    groups, generator = make_groups([20_000]), torch.Generator().manual_seed(0)
    names = tuple(f"c{number:02d}" for number in range(20))
    base = torch.randn(20_000, generator=generator)
    points = {name: base + torch.randn(20_000, generator=generator) for name in names}
    exact = add_round(no_evidence(names, groups), replies_at(points), torch.zeros(20_000), groups).products[0]
    monkeypatch.setattr(module, "NUMBERS", 256 * len(names))
    module._buckets.cache_clear()
    module._layout.cache_clear()
    sketched = add_round(no_evidence(names, groups), replies_at(points), torch.zeros(20_000), groups)
    module._buckets.cache_clear()
    module._layout.cache_clear()
    assert sketched.sums.shape == (20, 256)
    error = (sketched.products[0] - exact).std()
    assert float(error) < 2 / math.sqrt(256)
    assert float((sketched.products[0] - exact).mean().abs()) < 0.1
