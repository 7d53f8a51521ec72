"""Departures by persistence, against sums over single rounds, clients and pairs that share no code with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import Replies, Reply, mean
from grpo_fed.aggregation.merge import evidence as evidence_module
from grpo_fed.aggregation.merge.evidence import (
    Evidence,
    Panel,
    add_round,
    begin_anew,
    measure_updates,
    new_panel,
    no_evidence,
    systematic,
)
from grpo_fed.aggregation.merge.persistence import (
    AFTER_A_FALL,
    MIN_ROUNDS,
    Asking,
    Findings,
    Heard,
    persistence,
    rounds_of_evidence,
)
from grpo_fed.policy.groups import Groups

NAMES = ("a", "b", "c", "d", "e", "f")


def make_groups(sizes: list[int], blocks: list[str] | None = None, ordered: bool = True) -> Groups:
    names = tuple(f"g{i}" for i in range(len(sizes)))
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    chains = ("actor",) * len(sizes) if ordered else ()
    return Groups(names, ids, torch.tensor(sizes).float(), tuple(blocks or names), chains)


def replies_at(points: dict[str, Tensor], weights: dict[str, float] | None = None) -> Replies:
    return Replies.of(Reply(name, point, (weights or {}).get(name, 1.0)) for name, point in points.items())


def add(panel: Panel, points: dict[str, Tensor], groups: Groups) -> Panel:
    """Add a round in which these points were reached from 0."""
    replies = replies_at(points)
    return add_round(
        panel, replies, measure_updates(replies, torch.zeros(len(groups.ids)), groups, len(panel.clients)), groups
    )


def run_rounds(
    rounds: int,
    update: object,
    groups: Groups,
    names: tuple[str, ...] = NAMES,
    weights: dict[str, float] | None = None,
    scale: float = 1.0,
) -> tuple[Evidence, Tensor]:
    """Rounds in which each client's update is update(name, round), from where the last merge went."""
    shared, evidence = torch.zeros(len(groups.ids)), no_evidence(names, groups)
    for number in range(rounds):
        points = {name: shared + scale * update(name, number) for name in names}  # type: ignore[operator]
        merged, evidence, _ = persistence(replies_at(points, weights), shared, groups, evidence)
        shared = merged.point
    return evidence, shared


def departed(evidence: Evidence) -> dict[str, list[int]]:
    rows = [row for panel in evidence.panels for row in zip(panel.clients, panel.departed.tolist(), strict=True)]
    return {name: [group for group, left in enumerate(row) if left] for name, row in rows if any(row)}


@contextmanager
def small_memory(monkeypatch: pytest.MonkeyPatch, **limits: int) -> Iterator[None]:
    """Let the evidence have less room than it has."""
    for cached in (evidence_module.sketch_sizes, evidence_module._layout):
        cached.cache_clear()
    with monkeypatch.context() as context:
        for name, limit in limits.items():
            context.setattr(evidence_module, name, limit)
        yield
    for cached in (evidence_module.sketch_sizes, evidence_module._layout):
        cached.cache_clear()


# The statistic --------------------------------------------------------------------------------------------------------


def test_systematic_products_are_sums_over_pairs_of_different_rounds():
    groups, generator = make_groups([3, 2]), torch.Generator().manual_seed(0)
    taken = {"a": (0, 1, 2, 3), "b": (0, 2, 3), "c": (1, 3)}
    updates = {(name, r): torch.randn(5, generator=generator) for name, rounds in taken.items() for r in rounds}
    panel = new_panel(tuple(taken), groups)
    for r in range(4):
        points = {name: update for (name, at), update in updates.items() if at == r}
        panel = add(panel, points, groups)
    between, within = systematic(panel, groups)

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
        _, evidence, findings = persistence(replies_at(points), torch.zeros(2), groups, evidence)
        rho = findings.rho
    assert float(rho["a"]) == pytest.approx(1.0)
    # Now a goes +y, -y, +y, -y: products of different rounds are -1 (8 of 12 ordered pairs) or +1 (4): M_aa = -1/3.
    evidence = no_evidence(("a", "b", "c"), groups)
    for number in range(MIN_ROUNDS):
        points = {"a": y * (-1) ** number, "b": 2 * x, "c": 3 * x}
        _, evidence, findings = persistence(replies_at(points), torch.zeros(2), groups, evidence)
        rho = findings.rho
    assert float(rho["a"]) == pytest.approx((1 - 1 / 3) / 2), "b2 = |x|^2 + M_aa, v = |x|^2 + |y|^2"


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
    groups, up = make_groups([40]), torch.ones(40)
    towards = {name: -up if name == "f" else up for name in NAMES}
    assert not departed(run_rounds(MIN_ROUNDS - 1, noisy(towards, 0.1, 40), groups)[0])
    assert departed(run_rounds(MIN_ROUNDS, noisy(towards, 0.1, 40), groups)[0]) == {"f": [0]}


def test_a_group_of_one_parameter_needs_more_rounds():
    # rounds x (rounds - 1) must reach 400: 21 x 20 is the first that does.
    groups, up = make_groups([1]), torch.ones(1)
    towards = {name: -up if name == "f" else up for name in NAMES}
    assert not departed(run_rounds(20, noisy(towards, 0.1, 1), groups)[0])
    assert departed(run_rounds(21, noisy(towards, 0.1, 1), groups)[0]) == {"f": [0]}


def test_the_block_nearest_the_input_is_blamed_where_blocks_have_an_order():
    up = torch.ones(120) / 7
    update = noisy({name: -up if name == "f" else up for name in NAMES}, 0.05, 120)
    assert departed(run_rounds(MIN_ROUNDS, update, make_groups([40, 40, 40]))[0]) == {"f": [0]}
    assert departed(run_rounds(MIN_ROUNDS, update, make_groups([40, 40, 40], ordered=False))[0]) == {"f": [0, 1, 2]}


def test_of_two_chains_the_block_nearest_the_input_is_blamed_in_each():
    groups, up = make_groups([40, 40, 40, 40]), torch.ones(160) / 9
    groups = Groups(groups.names, groups.ids, groups.sizes, groups.blocks, ("actor", "actor", "critic", "critic"))
    update = noisy({name: -up if name == "f" else up for name in NAMES}, 0.05, 160)
    assert departed(run_rounds(MIN_ROUNDS, update, groups)[0]) == {"f": [0, 2]}


def test_all_groups_in_conflict_of_the_blamed_block_are_left_at_once():
    groups, up = make_groups([40, 40, 40, 40], ["torso", "torso", "torso", "actor"]), torch.ones(160) / 8
    contrary = up.clone()
    contrary[40:] *= -1
    towards = {name: contrary if name == "f" else up for name in NAMES}
    assert departed(run_rounds(MIN_ROUNDS, noisy(towards, 0.05, 160), groups)[0]) == {"f": [1, 2]}


def test_a_client_that_has_left_needs_twice_as_many_rounds_to_leave_again():
    groups, up = make_groups([40, 40]), torch.ones(80) / 6
    towards = {name: -up if name == "f" else up for name in NAMES}
    assert departed(run_rounds(MIN_ROUNDS + 2 * MIN_ROUNDS - 1, noisy(towards, 0.05, 80), groups)[0]) == {"f": [0]}
    assert departed(run_rounds(MIN_ROUNDS + 2 * MIN_ROUNDS, noisy(towards, 0.05, 80), groups)[0]) == {"f": [0, 1]}


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
    groups, up = make_groups([40, 40]), torch.ones(80) / 6
    towards = {name: -up if name == "f" else up for name in NAMES}
    update = noisy(towards, 0.2, 80)
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
    groups, up = make_groups([40]), torch.ones(40)
    update = noisy({name: -up if name == "f" else up for name in NAMES}, 0.1, 40)
    evidence, shared = no_evidence(NAMES, groups), torch.zeros(40)
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
    groups, generator = make_groups([20_000]), torch.Generator().manual_seed(0)
    names = tuple(f"c{number:02d}" for number in range(20))
    base = torch.randn(20_000, generator=generator)
    points = {name: base + torch.randn(20_000, generator=generator) for name in names}
    exact = add(new_panel(names, groups), points, groups).products[0]
    with small_memory(monkeypatch, NUMBERS=256 * len(names)):
        sketched = add(new_panel(names, groups), points, groups)
    assert sketched.sums.shape == (20, 256)
    error = (sketched.products[0] - exact).std()
    assert float(error) < 2 / math.sqrt(256)
    assert float((sketched.products[0] - exact).mean().abs()) < 0.1


def test_clients_of_a_large_federation_are_compared_in_panels(monkeypatch: pytest.MonkeyPatch):
    """With panels of 8 of 24 clients, each finds its own contrary client, and memory is that of three panels."""
    groups, up = make_groups([40]), torch.ones(40) / 6
    names = tuple(f"c{number:02d}" for number in range(24))
    with small_memory(monkeypatch, LEAST_PANEL=8, PRODUCTS=24 * 8):
        evidence = no_evidence(names, groups)
        assert [len(panel.clients) for panel in evidence.panels] == [8, 8, 8]
        assert sorted(name for panel in evidence.panels for name in panel.clients) == list(names)
        contrary = {panel.clients[0] for panel in evidence.panels}
        shared = torch.zeros(40)
        generator = torch.Generator().manual_seed(1)
        for _ in range(MIN_ROUNDS):
            points = {
                name: shared + (-up if name in contrary else up) + 0.1 * torch.randn(40, generator=generator)
                for name in names
            }
            merged, evidence, _ = persistence(replies_at(points), shared, groups, evidence)
            shared = merged.point
    assert departed(evidence) == {name: [0] for name in contrary}


def test_evidence_comes_back_from_its_arrays_and_goes_on_to_the_same_bits():
    groups, up = make_groups([40, 40]), torch.ones(80) / 6
    update = noisy({name: -up if name == "f" else up for name in NAMES}, 0.2, 80)
    evidence, shared = run_rounds(3, update, groups)
    read = no_evidence(NAMES, groups).with_arrays({name: part.clone() for name, part in evidence.arrays().items()})
    points = {name: shared + update(name, 3) for name in NAMES}  # type: ignore[operator]
    results = [persistence(replies_at(points), shared, groups, each) for each in (evidence, read)]
    assert torch.equal(results[0][0].point, results[1][0].point)
    assert departed(results[0][1]) == {"f": [0]}
    for name, part in results[0][1].arrays().items():
        torch.testing.assert_close(part, results[1][1].arrays()[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["0.sums", "0.asked", "0.fallen"])
def test_arrays_of_other_clients_are_refused_by_name(name: str):
    groups = make_groups([3])
    arrays = no_evidence(NAMES, groups).arrays()
    with pytest.raises(ValueError, match=name):
        no_evidence(NAMES, groups).with_arrays({key: part for key, part in arrays.items() if key != name})
    with pytest.raises(ValueError, match=name):
        no_evidence(NAMES, groups).with_arrays(arrays | {name: arrays[name][:-1]})


def test_small_groups_take_more_rounds():
    # 400 / n <= r (r - 1): 4 x 3 = 12 does for 34 parameters and more; 21 x 20 = 420 for one.
    assert [rounds_of_evidence(size) for size in (1000, 34, 33, 1)] == [4, 4, 5, 21]


def test_updates_are_measured_from_where_each_client_began():
    """Rounds that do not wait: f began elsewhere, but moved as all others did."""
    groups, up = make_groups([40]), torch.ones(40)
    evidence, shared = no_evidence(NAMES, groups), torch.zeros(40)
    update = noisy(dict.fromkeys(NAMES, up), 0.1, 40)
    for number in range(3 * MIN_ROUNDS):
        starts = {name: shared - 40 * up if name == "f" else shared for name in NAMES}
        replies = Replies.of(
            Reply(name, starts[name] + update(name, number), 1.0, start=starts[name])  # type: ignore[operator]
            for name in NAMES
        )
        merged, evidence, _ = persistence(replies, shared, groups, evidence)
        assert merged.point.mean() == pytest.approx(float(shared.mean()) + 1, abs=0.1), "updates are averaged"
        shared = merged.point
    assert not departed(evidence)


# Asking clients -------------------------------------------------------------------------------------------------------

OPPOSED = noisy({name: -torch.ones(80) if name == "f" else torch.ones(80) for name in NAMES}, 0.1, 80)
TWO_GROUPS = make_groups([40, 40])


def play_rounds(
    rounds: int,
    shares: dict[int, bool],
    asking: Asking,
    low: dict[int, set[str]] | None = None,
    update: object = OPPOSED,
) -> tuple[Evidence, dict[int, Findings], dict[int, dict[str, tuple[int, ...]]]]:
    """Rounds from 1 in which clients that were asked say whether they share; what was found and asked in each."""
    evidence, shared = no_evidence(NAMES, TWO_GROUPS), torch.zeros(80)
    found, asked = {}, {}
    for number in range(1, rounds + 1):
        heard = Heard(dict.fromkeys(evidence.asked, shares.get(number, False)), (low or {}).get(number, set()))
        points = {name: shared + update(name, number) for name in NAMES}  # type: ignore[operator]
        merged, evidence, found[number] = persistence(replies_at(points), shared, TWO_GROUPS, evidence, asking, heard)
        asked[number] = dict(evidence.asked)
        shared = merged.point
    return evidence, found, {number: each for number, each in asked.items() if each}


def test_a_client_in_conflict_is_asked_and_leaves_by_its_answer():
    evidence, found, asked = play_rounds(5, {5: False}, Asking(confirm=True))
    assert asked == {4: {"f": (0,)}}
    assert not found[4].left
    assert list(found[5].left) == ["f"]
    assert found[5].left["f"][0] > 0.5
    assert departed(evidence) == {"f": [0]}
    assert int(evidence.panels[0].rounds[5]) == 1, "its evidence began anew, with the round after it left"


def test_a_client_that_shares_no_worse_stays_and_is_asked_again_after_twice_as_many_rounds():
    evidence, found, asked = play_rounds(12, {5: True}, Asking(confirm=True))
    assert asked == {4: {"f": (0,)}, 12: {"f": (0,)}}
    assert list(found[5].stayed) == ["f"]
    assert not departed(evidence)


def test_a_client_that_does_not_answer_is_asked_until_it_does():
    evidence, shared = no_evidence(NAMES, TWO_GROUPS), torch.zeros(80)
    for number in range(1, 8):
        present = [name for name in NAMES if name != "f" or number < 5 or number == 7]
        points = {name: shared + OPPOSED(name, number) for name in present}  # type: ignore[operator]
        heard = Heard({"f": False} if number == 7 else {})
        asking = Asking(confirm=True)
        merged, evidence, _ = persistence(replies_at(points), shared, TWO_GROUPS, evidence, asking, heard)
        shared = merged.point
        assert dict(evidence.asked) == ({"f": (0,)} if 4 <= number < 7 else {})
    assert departed(evidence) == {"f": [0]}


def test_who_has_left_is_asked_to_come_back_to_all_and_to_one_block_in_turn():
    # f leaves group 0 in round 4, is asked in rounds 7 and 10, and leaves group 1 in round 4 + 8.
    shares = dict.fromkeys(range(1, 40), False)
    _, found, asked = play_rounds(31, shares, Asking(rejoin=3))
    assert [number for number in found if found[number].left] == [4, 12]
    later = {number: each["f"] for number, each in asked.items() if number > 12}
    assert later == {15: (0, 1), 18: (1,), 21: (0, 1), 24: (0,), 27: (0, 1), 30: (1,)}


def test_a_client_that_comes_back_shares_again_and_its_evidence_begins_anew():
    evidence, found, asked = play_rounds(8, {8: True}, Asking(rejoin=3))
    assert asked == {7: {"f": (0,)}}
    assert list(found[8].returned) == ["f"]
    assert not departed(evidence)
    panel = evidence.panels[0]
    assert int(panel.rounds[5]) == 1
    assert int(panel.decisions[5]) == 2, "leaving and coming back are decisions"


def test_rejoin_0_never_asks():
    assert not play_rounds(30, {}, Asking(rejoin=0))[2]


# Falling returns ------------------------------------------------------------------------------------------------------

ALIKE = noisy(dict.fromkeys(NAMES, torch.ones(80)), 0.1, 80)


def test_a_client_whose_returns_fell_and_stay_low_is_asked_for_all_it_shares():
    low = {number: {"f"} for number in range(12, 30)}
    _, _, asked = play_rounds(15, {}, Asking(confirm=True), low, ALIKE)
    assert asked == {15: {"f": (0, 1)}}, "four rounds after the fall, though its updates are like all others"


def test_a_client_whose_returns_rise_again_is_not_asked():
    low = {number: {"f"} for number in range(12, 14)}
    assert not play_rounds(30, {}, Asking(confirm=True), low, ALIKE)[2]


def test_a_fall_of_half_of_the_clients_says_nothing_about_one():
    low = {number: {"d", "e", "f"} for number in range(12, 30)}
    assert not play_rounds(25, {}, Asking(confirm=True), low, ALIKE)[2]


def test_falls_in_every_round_do_not_keep_a_client_from_being_judged():
    low = {number: {"f"} for number in range(1, 30)}
    _, _, asked = play_rounds(AFTER_A_FALL, dict.fromkeys(range(40), True), Asking(confirm=True), low)
    assert 4 in asked


def test_what_is_forgotten_of_a_client_is_all_that_it_was_part_of():
    groups = make_groups([6])
    panel, generator = new_panel(("a", "b", "c"), groups), torch.Generator().manual_seed(0)
    rounds = [{name: torch.randn(6, generator=generator) for name in "abc"} for _ in range(4)]
    for points in rounds:
        panel = add(panel, points, groups)
    forgotten = begin_anew(panel, torch.tensor([1]))
    without = new_panel(("a", "b", "c"), groups)
    for points in rounds:
        kept = {name: point for name, point in points.items() if name != "b"}
        without = add(without, kept, groups)
    for name in ("sums", "products", "common"):
        assert torch.equal(getattr(forgotten, name), getattr(without, name))


def test_groups_that_do_not_follow_each_other_are_merged_like_groups_that_do():
    """The same updates with the parameters in another order: one client is cut in a group, and one has left another."""
    sizes, generator = [40, 40, 3], torch.Generator().manual_seed(5)
    plain = make_groups(sizes)
    order = torch.randperm(83, generator=generator)
    mixed = Groups(plain.names, plain.ids[order], plain.sizes, plain.blocks, plain.chains)
    shared = torch.zeros(83)
    evidence = {True: no_evidence(NAMES, plain), False: no_evidence(NAMES, mixed)}
    update = noisy({name: -torch.ones(83) if name == "f" else torch.ones(83) for name in NAMES}, 0.1, 83)
    for number in range(MIN_ROUNDS + 2):
        points = {name: update(name, number) for name in NAMES}  # type: ignore[operator]
        points["a"][:40] *= 10
        merged = {}
        for in_order, groups in ((True, plain), (False, mixed)):
            given = points if in_order else {name: point[order] for name, point in points.items()}
            merged[in_order], evidence[in_order], _ = persistence(replies_at(given), shared, groups, evidence[in_order])
        torch.testing.assert_close(merged[True].point[order], merged[False].point)
        assert departed(evidence[True]) == departed(evidence[False])
    assert departed(evidence[True])
