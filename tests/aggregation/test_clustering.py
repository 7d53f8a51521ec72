"""Learned clusters of clients, over rounds of updates with a direction and noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import Merged, Replies, Reply, mean
from grpo_fed.aggregation.merge.clustering import ClusterEvidence, clusters, no_cluster_evidence
from grpo_fed.aggregation.merge.persistence import MIN_ROUNDS
from grpo_fed.policy.groups import Groups
from tests.support.merge_replies import bits, make_groups

NAMES = ("a", "b", "c", "d", "e", "f")
GROUPS = make_groups([0] * 20 + [1] * 20 + [2] * 40 + [-1] * 2, ["left", "left", "right"])
"""Block left has two groups of 20 parameters, block right one of 40; two parameters are in none."""
P = len(GROUPS.ids)
LEFT = slice(0, 40)
REST = slice(40, P)
THREE = ("abcdefghijkl", "mnopq", "rs")
"""The clients of three kinds."""
NOBODY: Mapping[str, float] = MappingProxyType({})

Update = Callable[[str, int], Tensor]


@dataclass(frozen=True, eq=False)
class Rounds:
    """What came of some rounds."""

    merged: Merged
    evidence: ClusterEvidence
    points: Mapping[str, Tensor]
    """[P]: where each client would begin the next round."""
    labels: Sequence[Mapping[str, tuple[int, ...]]]
    """The cluster of each client in the blocks left and right, after each round."""

    @property
    def last(self) -> Mapping[str, tuple[int, ...]]:
        return self.labels[-1]


def noisy(towards: Mapping[str, Tensor], noise: float = 0.1, seed: int = 0) -> Update:
    """Make updates along a direction of each client's own, with noise that is new in every round."""

    def update(name: str, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 100_000 + number * 1_000 + ord(name))
        return towards[name] + noise * torch.randn(P, generator=generator)

    return update


def run_rounds(
    rounds: int,
    update: Update,
    names: Collection[str] = NAMES,
    weights: Mapping[str, float] = NOBODY,
    most: int = 8,
    absent: Callable[[str, int], bool] = lambda name, number: False,
    groups: Groups = GROUPS,
) -> Rounds:
    """Run rounds in which each client begins with its cluster's mean and moves by update(name, round).

    weights: of clients whose weight is not 1.
    """
    evidence = no_cluster_evidence(tuple(names), groups)
    shared, points, labels = torch.zeros(P), {name: torch.zeros(P) for name in names}, []
    for number in range(rounds):
        replies = Replies.of(
            Reply(name, points[name] + update(name, number), weights.get(name, 1.0), start=points[name])
            for name in names
            if not absent(name, number)
        )
        merged, evidence = clusters(replies, shared, groups, evidence, most)
        assert merged.clusters is not None
        shared = merged.point
        points |= {name: merged.clusters.point(index) for index, name in enumerate(merged.clients)} | merged.absent
        labels.append(dict(zip(evidence.panel.clients, map(tuple, evidence.labels.tolist()), strict=True)))
    return Rounds(merged, evidence, points, labels)


def kinds(labels: Mapping[str, tuple[int, ...]], block: int = 0) -> set[frozenset[str]]:
    """Divide the clients by their cluster in a block."""
    found = {name: of_blocks[block] for name, of_blocks in labels.items()}
    return {frozenset(name for name in found if found[name] == label) for label in found.values()}


def two_kinds(names: Sequence[str] = NAMES, few: Collection[str] = "ef") -> dict[str, Tensor]:
    """Make directions that are opposed in block left alone, for a few clients and all others."""
    along = torch.full((P,), 0.3)
    against = along.clone()
    against[LEFT] *= -1
    return {name: against if name in few else along for name in names}


def three_kinds() -> dict[str, Tensor]:
    """Make directions at 120 degrees to each other in block left for 12, 5 and 2 clients, the same in all the rest.

    The mean of two kinds at 120 degrees sets the smaller one back if that is less than half as large as the other.
    """
    sine = 3**0.5 / 2
    directions = {}
    for clients, (x, y) in zip(THREE, ((1.0, 0.0), (-0.5, sine), (-0.5, -sine)), strict=True):
        towards = torch.full((P,), 0.3)
        towards[:20], towards[20:40] = 0.5 * x, 0.5 * y
        directions |= dict.fromkeys(clients, towards)
    return directions


# Who parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_two_kinds_part_in_the_separating_block_from_the_fourth_round_on(seed: int) -> None:
    result = run_rounds(40, noisy(two_kinds(), seed=seed))
    for number, labels in enumerate(result.labels, 1):
        apart = {frozenset("abcd"), frozenset("ef")} if number >= MIN_ROUNDS else {frozenset(NAMES)}
        assert kinds(labels, 0) == apart
        assert kinds(labels, 1) == {frozenset(NAMES)}


@pytest.mark.parametrize("seed", range(5))
def test_three_kinds_are_three_clusters(seed: int) -> None:
    directions = three_kinds()
    result = run_rounds(40, noisy(directions, seed=seed), tuple(directions))
    largest, second, third = map(frozenset, THREE)
    for number, labels in enumerate(result.labels, 1):
        if number < MIN_ROUNDS:
            assert kinds(labels, 0) == {frozenset(directions)}
        elif number < 3 * MIN_ROUNDS:  # those that parted take twice as many rounds before they part again
            assert kinds(labels, 0) == {largest, second | third}
        else:
            assert kinds(labels, 0) == {largest, second, third}
        assert kinds(labels, 1) == {frozenset(directions)}


@pytest.mark.parametrize("seed", range(5))
def test_a_block_has_at_most_so_many_clusters(seed: int) -> None:
    directions = three_kinds()
    result = run_rounds(40, noisy(directions, seed=seed), tuple(directions), most=2)
    assert {len(kinds(labels)) for labels in result.labels} == {1, 2}


@pytest.mark.parametrize("seed", range(5))
def test_random_steps_never_part_clients(seed: int) -> None:
    """Tiny steps in random directions, whatever their scale."""
    result = run_rounds(60, noisy(dict.fromkeys(NAMES, torch.zeros(P)), 1e-4, seed))
    assert not result.evidence.labels.any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_alike_clients_with_noise_never_part(noise: float, seed: int) -> None:
    result = run_rounds(60, noisy(dict.fromkeys(NAMES, torch.full((P,), 0.3)), noise, seed))
    assert not result.evidence.labels.any()


# Where they go --------------------------------------------------------------------------------------------------------


def test_clients_of_one_cluster_get_the_weighted_mean_of_their_replies() -> None:
    """Worked by hand: in round 5, kinds a, b (weights 1 and 3) and c (weight 2) reply from where they begin."""
    directions = {name: sign * torch.full((P,), 1.0) for name, sign in (("a", 1.0), ("b", 1.0), ("c", -1.0))}
    before = run_rounds(4, lambda name, number: directions[name], "abc", {"b": 3.0, "c": 2.0})
    assert kinds(before.last, 0) == kinds(before.last, 1) == {frozenset("ab"), frozenset("c")}
    points = {"a": torch.full((P,), 4.0), "b": torch.full((P,), 8.0), "c": torch.full((P,), -5.0)}
    weights = {"a": 1.0, "b": 3.0, "c": 2.0}
    replies = Replies.of(Reply(name, point, weights[name], start=before.points[name]) for name, point in points.items())
    merged, _ = clusters(replies, before.merged.point, GROUPS, before.evidence)
    assert merged.clusters is not None
    assert merged.clusters.blocks == ("left", "right")
    for client, expected in enumerate((7.0, 7.0, -5.0)):  # (1 * 4 + 3 * 8) / 4, and c alone
        assert merged.clusters.point(client)[:80].tolist() == [expected] * 80
        assert merged.clusters.point(client)[80:].tolist() == [3.0] * 2  # all of them: (4 + 24 - 10) / 6
    # In each of a group's 20 or 40 parameters a differs by 3 from its cluster's mean, b by 1 and c by nothing.
    size = GROUPS.sizes.sqrt()
    torch.testing.assert_close(merged.deviations, torch.stack([3 * size, size, 0 * size]))
    assert torch.equal(merged.point, merged.clusters.point(0)), "cluster 0 has the most weight"
    assert not merged.departed.any()


@pytest.mark.parametrize(("weight", "first"), [(1.0, "abcd"), (10.0, "ef")])
def test_the_cluster_of_most_weight_is_the_first(weight: float, first: str) -> None:
    merged = run_rounds(5, noisy(two_kinds()), weights={"e": weight, "f": weight}).merged
    assert merged.clusters is not None
    members = dict(zip(merged.clients, merged.clusters.members[:, 0].tolist(), strict=True))
    assert [members[name] for name in NAMES] == [int(name not in first) for name in NAMES]


@pytest.mark.parametrize("seed", range(3))
def test_without_conflicts_all_get_the_mean_to_the_bit(seed: int) -> None:
    update = noisy(dict.fromkeys(NAMES, torch.full((P,), 0.3)), seed=seed)
    weights = {name: 0.3 + 0.7 * number for number, name in enumerate(NAMES)}
    shared, evidence = torch.zeros(P), no_cluster_evidence(NAMES, GROUPS)
    for number in range(20):
        replies = Replies.of(Reply(name, shared + update(name, number), weights[name]) for name in NAMES)
        merged, evidence = clusters(replies, shared, GROUPS, evidence)
        plain = mean(replies, shared, GROUPS)
        assert merged.clusters is not None
        assert len(merged.clusters.points) == 1
        assert bits(merged.point) == bits(merged.clusters.point(0)) == bits(plain.point)
        assert torch.equal(merged.deviations, plain.deviations)
        shared = merged.point


def test_a_client_without_weight_gets_its_clusters_mean_and_changes_nothing() -> None:
    directions = two_kinds()
    for kind, friend in (("abc", "a"), ("ef", "e")):
        everyone = {**{name: directions[name] for name in NAMES if name != "d"}, "z": directions[friend]}
        result = run_rounds(12, noisy(everyone), tuple(everyone), {"z": 0.0})
        without = run_rounds(12, noisy(directions), "abcef")
        assert kinds(result.last) == {*(kinds(without.last) - {frozenset(kind)}), frozenset({*kind, "z"})}
        for name in "abcef":
            assert bits(result.points[name]) == bits(without.points[name])
        assert bits(result.points["z"]) == bits(result.points[friend])


def test_absent_clients_keep_their_cluster() -> None:
    """From round 5 on, e comes to every third round alone, and a to none."""
    result = run_rounds(
        30, noisy(two_kinds()), absent=lambda name, number: number > 4 and (name == "a" or (name == "e" and number % 3))
    )
    for labels in result.labels[MIN_ROUNDS - 1 :]:
        assert kinds(labels) == {frozenset("abcd"), frozenset("ef")}


def test_absent_clients_move_with_their_cluster() -> None:
    result = run_rounds(30, noisy(two_kinds()), absent=lambda name, number: number > 4 and name in "ae")
    assert kinds(result.last) == {frozenset("abcd"), frozenset("ef")}
    assert bits(result.points["a"]) == bits(result.points["b"])
    assert bits(result.points["e"]) == bits(result.points["f"])


def test_an_absent_client_stays_where_it_was_if_its_whole_cluster_is_absent() -> None:
    before = run_rounds(5, noisy(two_kinds()))
    after = run_rounds(9, noisy(two_kinds()), absent=lambda name, number: number >= 5 and name in "ef")
    assert bits(after.points["e"]) == bits(before.points["e"])
    assert bits(after.points["a"]) != bits(before.points["a"])


def test_a_client_that_was_absent_until_now_parts_when_it_has_evidence_of_its_own() -> None:
    result = run_rounds(20, noisy(two_kinds()), absent=lambda name, number: name == "f" and number < 10)
    first = next(number for number, labels in enumerate(result.labels, 1) if labels["f"] != labels["a"])
    assert first == 10 + MIN_ROUNDS
    assert all(labels["f"][1] == labels["a"][1] for labels in result.labels)


# What changes nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_updates_does_not_matter(scale: float) -> None:
    update = noisy(two_kinds())
    result, scaled = run_rounds(12, update), run_rounds(12, lambda name, number: scale * update(name, number))
    assert result.labels == scaled.labels
    assert len(kinds(result.last)) == 2


def test_the_learning_rate_of_one_client_changes_no_others_cluster() -> None:
    update = noisy(two_kinds())
    for quick in "ae":
        result = run_rounds(
            20, lambda name, number, quick=quick: (10.0 if name == quick else 1.0) * update(name, number)
        )
        assert result.labels == run_rounds(20, update).labels


def test_names_do_not_matter() -> None:
    names = dict(zip(NAMES, "fdbeca", strict=True))
    old = {new: name for name, new in names.items()}
    update = noisy(two_kinds())
    result, permuted = run_rounds(12, update), run_rounds(12, lambda name, number: update(old[name], number))
    for labels, others in zip(result.labels, permuted.labels, strict=True):
        for block in range(2):
            assert kinds({names[name]: of for name, of in labels.items()}, block) == kinds(others, block)
    for name in NAMES:
        torch.testing.assert_close(result.points[name], permuted.points[names[name]])


def test_updates_are_compared_from_where_each_client_began() -> None:
    """Clients that begin far apart on opposite sides but move alike stay together; without their starts they part."""
    update = noisy(dict.fromkeys(NAMES, torch.full((P,), 0.3)))
    far = {name: torch.full((P,), 100.0 if name in "abcd" else -100.0) for name in NAMES}
    parted = {}
    for has_start in (True, False):
        evidence = no_cluster_evidence(NAMES, GROUPS)
        for number in range(12):
            replies = Replies.of(
                Reply(name, far[name] + update(name, number), 1.0, start=far[name] if has_start else None)
                for name in NAMES
            )
            _, evidence = clusters(replies, torch.zeros(P), GROUPS, evidence)
        parted[has_start] = bool(evidence.labels.any())
    assert parted == {True: False, False: True}


@pytest.mark.parametrize("cut", [2, 4, 9])
def test_evidence_goes_on_from_a_checkpoint_to_the_bit(cut: int) -> None:
    update, whole = noisy(two_kinds(), seed=1), run_rounds(12, noisy(two_kinds(), seed=1))
    points, evidence = {name: torch.zeros(P) for name in NAMES}, no_cluster_evidence(NAMES, GROUPS)
    for number in range(12):
        if number == cut:
            arrays = {name: tensor.clone() for name, tensor in evidence.arrays().items()}
            evidence = no_cluster_evidence(NAMES, GROUPS).with_arrays(arrays)
        replies = Replies.of(Reply(n, points[n] + update(n, number), 1.0, start=points[n]) for n in NAMES)
        merged, evidence = clusters(replies, torch.zeros(P), GROUPS, evidence)
        assert merged.clusters is not None
        points = {name: merged.clusters.point(index) for index, name in enumerate(merged.clients)}
    assert evidence.arrays().keys() == whole.evidence.arrays().keys()
    for name, tensor in whole.evidence.arrays().items():
        assert torch.equal(evidence.arrays()[name].nan_to_num(), tensor.nan_to_num()), name
    for name in NAMES:
        assert bits(points[name]) == bits(whole.points[name])


@pytest.mark.parametrize("name", ["labels", "sums", "common"])
def test_arrays_that_are_missing_or_do_not_fit_are_refused(name: str) -> None:
    evidence = no_cluster_evidence(NAMES, GROUPS)
    arrays = evidence.arrays()
    with pytest.raises(ValueError, match=name):
        evidence.with_arrays({key: tensor for key, tensor in arrays.items() if key != name})
    with pytest.raises(ValueError, match=name):
        evidence.with_arrays({**arrays, name: arrays[name][1:]})
