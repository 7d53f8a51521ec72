"""Learned groups: which units of a block become a group, and what clients then leave, with numbers worked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from grpo_fed.aggregation.merge import Replies, Reply
from grpo_fed.aggregation.merge.evidence import add_round, measure_updates, new_panel, no_evidence, systematic
from grpo_fed.aggregation.merge.learned_groups import UnitEvidence, learn_groups
from grpo_fed.aggregation.merge.persistence import persistence
from grpo_fed.policy.groups import Groups

WEIGHTS = torch.ones(2, dtype=torch.float64)
NAMES = ("a", "b", "c", "d", "e", "f")


def units_of(blocks: Sequence[str], size: int = 16, learned: Sequence[str] = ("torso",)) -> Groups:
    """Make units of equal size, each in the block of its place."""
    names = tuple(f"{block}:{number}" for number, block in enumerate(blocks))
    ids = torch.arange(len(blocks)).repeat_interleave(size)
    sizes = torch.full((len(blocks),), float(size))
    return Groups(names, ids, sizes, tuple(blocks), ("actor",) * len(blocks), frozenset(learned))


def evidence_of(rho: Sequence[float], numbers: int, shares: Sequence[Sequence[bool]] | None = None) -> UnitEvidence:
    """Make the evidence of two clients that differ by b2 = 2 rho, with v = 2, after four rounds: 12 pairs of rounds."""
    differs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) / 2
    return UnitEvidence(
        torch.tensor(rho, dtype=torch.float64)[:, None, None] * differs,
        torch.eye(2, dtype=torch.float64).repeat(len(rho), 1, 1),
        torch.tensor(shares or [[True] * len(rho)] * 2),
        torch.tensor([True, True]),
        torch.tensor([12, 12]),
        torch.full((len(rho),), numbers),
    )


def groups_of(rho: Sequence[float], numbers: int = 1000, shares: Sequence[Sequence[bool]] | None = None) -> list[int]:
    return learn_groups(
        evidence_of(rho, numbers, shares), WEIGHTS, units_of(["torso"] * len(rho))
    ).group_of_unit.tolist()


def test_units_are_divided_where_they_differ_by_more_than_chance() -> None:
    # Q = sum (rho - 0.5)^2 x 12 n / 2: 15.36 with n = 4 and 11.52 with n = 3; (Q - 3) / sqrt(6) is 5.05 and 3.48
    assert groups_of([0.9, 0.1, 0.9, 0.1], numbers=4) == [1, 0, 1, 0]
    assert groups_of([0.9, 0.1, 0.9, 0.1], numbers=3) == [0, 0, 0, 0]


@pytest.mark.parametrize("rho", [[0.45, 0.45, 0.05, 0.05], [0.95, 0.95, 0.6, 0.6]])
def test_units_are_not_divided_where_parting_pays_for_both_sides_or_for_none(rho: list[float]) -> None:
    assert groups_of(rho) == [0, 0, 0, 0]


def test_parts_are_divided_again_only_where_it_matters() -> None:
    assert groups_of([0.95, 0.7, 0.1]) == [1, 1, 0]
    # the upper side of the greatest cut, {0.98, 0.4, 0.38}, pays as a whole, 0.587, and is divided once more
    assert groups_of([0.98, 0.4, 0.38, -0.4, -0.4]) == [2, 1, 1, 0, 0]


def test_what_is_known_of_units_adds_up() -> None:
    learned = learn_groups(evidence_of([0.9, 0.1, 0.7], 1000), WEIGHTS, units_of(["torso"] * 3))
    assert learned.group_of_unit.tolist() == [1, 0, 1]
    assert learned.groups.names == ("torso:1", "torso:0")
    assert learned.groups.sizes.tolist() == [16, 32]
    assert learned.groups.ids.tolist() == [1] * 16 + [0] * 16 + [1] * 16
    assert learned.evidence.numbers.tolist() == [1000, 2000]
    assert learned.evidence.within[1].tolist() == [[2, 0], [0, 2]]
    assert learned.evidence.between[1].flatten().tolist() == pytest.approx([0.8, -0.8, -0.8, 0.8])


def test_units_that_not_the_same_clients_share_are_not_in_one_group() -> None:
    shares = [[True] * 4, [True, True, False, False]]
    assert groups_of([0.1, 0.1, 0.1, 0.1], shares=shares) == [0, 0, 1, 1]


def test_groups_of_other_blocks_stay_as_they_are() -> None:
    groups = units_of(["torso", "torso", "actor", "actor"])
    evidence = evidence_of([0.1, 0.1, 0.1, 0.1], 1000)
    assert learn_groups(evidence, WEIGHTS, groups).group_of_unit.tolist() == [0, 0, 1, 2]
    plain = units_of(["torso", "torso", "actor", "actor"], learned=())
    assert learn_groups(evidence, WEIGHTS, plain).groups is plain


def planted(round: int, opposed: Sequence[int], size: int = 16) -> dict[str, Tensor]:
    """Make a round's updates of six clients: a common direction and noise; e and f go the other way in some units."""
    generator = torch.Generator().manual_seed(round)
    direction = torch.ones(4, size)
    turned = direction.clone()
    turned[list(opposed)] *= -1
    return {
        name: ((turned if name in "ef" else direction) + 0.7 * torch.randn(4, size, generator=generator)).flatten()
        for name in NAMES
    }


def test_evidence_of_units_adds_up_to_that_of_their_block() -> None:
    units, block = units_of(["torso"] * 4), units_of(["torso"] * 4).as_blocks
    panels = {id(each): new_panel(NAMES, each) for each in (units, block)}
    for number in range(3):
        replies = Replies.of(Reply(name, point, 1.0) for name, point in planted(number, [2]).items())
        for each in (units, block):
            updates = measure_updates(replies, torch.zeros(64), each, len(NAMES))
            panels[id(each)] = add_round(panels[id(each)], replies, updates, each)
    for parts, whole in zip(systematic(panels[id(units)], units), systematic(panels[id(block)], block), strict=True):
        torch.testing.assert_close(parts.sum(0), whole[0], rtol=0, atol=1e-6)


def left_by(groups: Groups, opposed: Sequence[int]) -> dict[str, list[int]]:
    """Run seven rounds of planted updates; return what each client has left."""
    shared, evidence = torch.zeros(64), no_evidence(NAMES, groups)
    for number in range(7):
        points = planted(number, opposed)
        replies = Replies.of(Reply(name, shared + update, 1.0) for name, update in points.items())
        merged, evidence, _ = persistence(replies, shared, groups, evidence)
        shared = merged.point
    (panel,) = evidence.panels
    left = {name: row.nonzero().flatten().tolist() for name, row in zip(panel.clients, panel.departed, strict=True)}
    return {name: units for name, units in left.items() if units}


@pytest.mark.parametrize("opposed", [[1], [2, 3], [0, 1, 2, 3]])
def test_clients_leave_the_units_on_which_they_differ(opposed: list[int]) -> None:
    assert left_by(units_of(["torso"] * 4), opposed) == {"e": opposed, "f": opposed}


def test_clients_that_differ_on_nothing_leave_nothing() -> None:
    assert left_by(units_of(["torso"] * 4), []) == {}
