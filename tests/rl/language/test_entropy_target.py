"""A target for the entropy of a language model's tokens."""

from __future__ import annotations

import math

import pytest

from grpo_fed.rl.client_stack import ENTROPY_WEIGHTS
from grpo_fed.rl.language.batches import sampled_entropies
from tests.support.small_language import completions_of, make_learner, words


def test_the_entropy_of_a_batch_is_the_mean_surprise_of_its_tokens() -> None:
    learner = make_learner(words(clients=("up", "down")))
    batch, _ = learner.collect()
    found = sampled_entropies(batch)
    assert found.shape == (2, 1)
    for client in range(2):
        surprises = [-value for each in completions_of(batch, client) for value in each.old.tolist()]
        assert found[client].item() == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)


def test_the_weight_of_the_entropy_of_tokens_adapts_and_is_remembered() -> None:
    """One update from the weight 0.05: it becomes 0.05 exp(0.3 (9 - entropy)), and is what the update uses."""
    targets = ("objective.entropy_target=9", "objective.entropy_rate=0.3", "objective.entropy=0.05")
    learner = make_learner(words(*targets, clients=("up",)))
    (report,) = learner.train(8)
    expected = 0.05 * math.exp(0.3 * (9 - report.more["entropy/action"]))
    assert report.more["entropy_multiplier/action"] == pytest.approx(expected, rel=1e-5)
    assert learner.state(0)[ENTROPY_WEIGHTS].tolist() == pytest.approx([expected], rel=1e-5)
    fixed = make_learner(words(f"objective.entropy={expected}", clients=("up",)))
    fixed.train(8)
    assert abs(fixed.parameters - learner.parameters).max() < 1e-4
    other = make_learner(words(*targets, clients=("up",)))
    other.load([learner.state(0)])
    assert other.stack.entropy.equal(learner.stack.entropy)
