"""Patterns: which names they match, and what value each name has from them."""

from __future__ import annotations

import re

import pytest

from grpo_fed.policy.patterns import match_names, owner_by_name, values_by_name

NAMES = ["torso.0", "torso.1", "actor", "critic"]


def test_a_pattern_matches_names_in_their_order():
    assert match_names("torso.*", NAMES, "policy.shared", "block") == ["torso.0", "torso.1"]
    assert match_names("*r*", NAMES, "policy.shared", "block") == NAMES
    assert match_names("actor", NAMES, "policy.shared", "block") == ["actor"]


def test_every_name_has_the_value_of_the_pattern_that_matches_it():
    values = values_by_name({"actor": 0.5, "torso.*": 0.1}, NAMES, "trust.blocks", "block")
    assert list(values.items()) == [("actor", 0.5), ("torso.0", 0.1), ("torso.1", 0.1)]


def test_no_patterns_give_no_values():
    assert values_by_name({}, NAMES, "trust.blocks", "block") == {}
    assert values_by_name({}, [], "trust.blocks", "block") == {}


@pytest.mark.parametrize(
    ("patterns", "error"),
    [
        ({"torzo.*": 1.0}, 'merge.blocks: "torzo.*" matches no block; did you mean "torso.1"?'),
        ({"x": 1.0}, 'merge.blocks: "x" matches no block; there are ["torso.0", "torso.1", "actor", "critic"]'),
        ({"*": 1.0, "act*": 1.0}, 'merge.blocks: "*" and "act*" both match "actor"; narrow one of the patterns'),
    ],
)
def test_patterns_that_do_not_fit_are_refused_with_the_cure(patterns: dict[str, float], error: str):
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        values_by_name(patterns, NAMES, "merge.blocks", "block")


def test_an_owner_may_match_a_name_twice_but_not_another_owners():
    assert owner_by_name({"trunk": ["a", "b", "a"], "head": ["c"]}, "policy.blocks") == {
        "a": "trunk",
        "b": "trunk",
        "c": "head",
    }
    with pytest.raises(ValueError, match=r'^policy\.blocks: "trunk" and "head" both match "b"; narrow'):
        owner_by_name({"trunk": ["a", "b"], "head": ["b"]}, "policy.blocks")
