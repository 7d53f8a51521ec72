"""Mutated scenarios, messages, checkpoints and runs give errors of ours: found ones, and a few new ones each time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.fuzz import TARGETS, change_bytes, check, mutate_tree
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.keys import all_keys

EXAMPLES = {"scenarios": 25, "messages": 40, "checkpoints": 6, "runs": 15}
CORPUS: list[tuple[str, dict[str, Any]]] = [
    # A reward without its function had no example of one.
    ("scenarios", {"name": "dialects", "mutations": [(36, "remove", 0)]}),
    ("scenarios", {"name": "contrary", "mutations": [(0, "replace", 16)]}),
    ("scenarios", {"name": "quickstart", "mutations": [(3, "replace", 4), (12, "copy", 5)]}),
    ("messages", {"which": "answer", "changes": [(500_000, 8, 255)]}),
    ("messages", {"which": "instruction", "changes": [(10, 64, 256)]}),
    ("checkpoints", {"mutations": [(1, "remove", 0)], "changes": [], "file": 0}),
    ("checkpoints", {"mutations": [], "changes": [(900_000, 3, 256)], "file": 2}),
    ("runs", {"file": "rounds.jsonl", "mutations": [(7, "wrap", 0)], "changes": []}),
    ("runs", {"file": "shared.json", "mutations": [], "changes": [(0, 1, 256)]}),
]
"""Mutations that had found something, or that stand for a kind of them."""


@pytest.mark.parametrize("target", TARGETS)
def test_new_mutations_give_errors_for_users(target: str):
    assert check(target, EXAMPLES[target]) >= EXAMPLES[target] // 2


@pytest.mark.parametrize(("target", "arguments"), CORPUS)
def test_mutations_of_the_corpus_give_errors_for_users(target: str, arguments: dict[str, Any]):
    TARGETS[target][0](**arguments)


def test_every_required_key_has_an_example():
    assert not [path for path, info in all_keys(Scenario) if info.is_required() and not info.examples]


def test_a_reward_without_a_function_is_told_one():
    text = 'name = "a"\nrounds = 1\nsteps = 64\n[[clients]]\nname = "x"\nprompts = "a:b"\nrewards = [{ weight = 2.0 }]'
    with pytest.raises(ValueError, match=r'function: missing; for example function = "exact"'):
        Scenario.loads(text)


def test_mutations_change_a_copy_of_a_tree():
    tree = {"a": [1, {"b": 2}]}  # places: the tree, a, a.0, a.1, a.1.b
    assert mutate_tree(tree, [(4, "rename", 0)]) == {"a": [1, {"bx": 2}]}
    assert mutate_tree(tree, [(2, "remove", 0)]) == {"a": [{"b": 2}]}
    assert mutate_tree(tree, [(2, "wrap", 0)]) == {"a": [[1, 1], {"b": 2}]}
    assert mutate_tree(tree, [(1, "replace", 1)]) == {"a": 1}
    assert tree == {"a": [1, {"b": 2}]}
    assert change_bytes(b"0123456789", [(500_000, 2, 65), (0, 1, 256)]) == b"1234AA789"
