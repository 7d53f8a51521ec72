"""Evidence about clients that join later."""

from __future__ import annotations

import pytest
import torch

from grpo_fed.aggregation.merge import Replies, Reply
from grpo_fed.aggregation.merge import evidence as evidence_module
from grpo_fed.aggregation.merge.evidence import Evidence, no_evidence, systematic, with_clients
from grpo_fed.aggregation.merge.persistence import persistence
from tests.support.merge_replies import make_groups

GROUPS = make_groups([0] * 30 + [1] * 30)
ZERO = torch.zeros(60)


def after_rounds(evidence: Evidence, names: str, rounds: int, seed: int = 0) -> Evidence:
    """Add rounds of updates that are noise about 1."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        points = {name: 1 + 0.1 * torch.randn(60, generator=generator) for name in names}
        replies = Replies.of(Reply(name, point, 1.0) for name, point in points.items())
        evidence = persistence(replies, ZERO, GROUPS, evidence)[1]
    return evidence


def test_known_clients_keep_their_evidence_when_others_join():
    before = after_rounds(no_evidence("bd", GROUPS), "bd", 3)
    after = with_clients(before, "abcd", GROUPS)
    (old,), (new,) = before.panels, after.panels
    assert new.clients == ("a", "b", "c", "d")
    assert new.rounds.tolist() == [0, 3, 0, 3]
    rows = torch.tensor([1, 3])
    for part, grown in zip(systematic(old, GROUPS), systematic(new, GROUPS), strict=True):
        torch.testing.assert_close(grown[:, rows[:, None], rows], part, rtol=1e-12, atol=1e-12)
    assert with_clients(after, "ab", GROUPS) is after


def test_the_first_clients_are_divided_as_those_of_a_scenario():
    names = [f"c{number:03d}" for number in range(200)]
    first = with_clients(Evidence(()), names, GROUPS)
    assert [panel.clients for panel in first.panels] == [panel.clients for panel in no_evidence(names, GROUPS).panels]


def test_clients_without_room_begin_a_new_panel():
    evidence = with_clients(no_evidence("abc", GROUPS), "abcdefgh", GROUPS, most=4)
    assert [panel.clients for panel in evidence.panels] == [tuple("abcd"), tuple("efgh")]


def test_evidence_begins_anew_where_sketches_become_smaller_and_departures_stay(monkeypatch: pytest.MonkeyPatch):
    for cached in (evidence_module.sketch_sizes, evidence_module._layout):
        cached.cache_clear()
    monkeypatch.setattr(evidence_module, "NUMBERS", 60)
    monkeypatch.setattr(evidence_module, "LEAST_NUMBERS", 8)
    (panel,) = after_rounds(no_evidence("ab", GROUPS), "ab", 3).panels
    panel.departed[0, 1] = True
    (grown,) = with_clients(Evidence((panel,)), "abc", GROUPS).panels
    assert (panel.sums.shape[1], grown.sums.shape[1]) == (60, 40)
    assert grown.rounds.tolist() == [0, 0, 0]
    assert grown.departed.tolist() == [[False, True], [False, False], [False, False]]
    for cached in (evidence_module.sketch_sizes, evidence_module._layout):
        cached.cache_clear()
