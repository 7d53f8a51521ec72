"""Learning with a memory: what is collected, evaluated and saved goes through time as a plain loop does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_fed.engines.alone import train
from grpo_fed.policy.recurrent import RecurrentPolicy
from grpo_fed.rl.advantages import LearningTargets
from grpo_fed.rl.batch import make_batch
from grpo_fed.rl.make import make_learners
from grpo_fed.rl.minibatches import PackedBatch
from grpo_fed.rl.recurrence import attach_first, attach_memory
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.policies import load_network
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.tasks.resolve import resolve_gym_tasks

RECALL = """
name = "recall"
steps = 256
rounds = 2
[policy]
memory = "gru"
units = 8
hidden = [8]
[rollout]
num_envs = 8
horizon = 16
episode_limit = 9
[objective]
epochs = 4
minibatches = 2
learning_rate = 5e-3
[[clients]]
name = "short"
env = "grpo_fed/Recall-v0"
kwargs = { delay = 3 }
[[clients]]
name = "cut"
env = "grpo_fed/Recall-v0"
kwargs = { delay = 20 }
"""


def learner_of(*overrides: str) -> StackedLearner:
    (learner,) = make_learners(Scenario.loads(RECALL, overrides=overrides))
    assert isinstance(learner, StackedLearner)
    return learner


def test_a_memory_is_empty_where_an_episode_begins() -> None:
    seen = np.array([[1.0, 2.0], [3.0, 4.0]])
    joined = attach_memory(seen, np.array([[5.0], [6.0]], np.float32), np.array([False, True]))
    assert joined.tolist() == [[1, 2, 5, 0], [3, 4, 0, 1]]
    assert attach_first(seen, 2).tolist() == [[1, 2, 0, 0, 1], [3, 4, 0, 0, 1]]
    assert attach_first(seen, 0) is seen


def test_collected_memories_are_those_of_a_plain_loop() -> None:
    """Over two calls, with episodes that end and that are cut: each memory follows from the step before."""
    learner = learner_of()
    policy = learner.policy
    assert isinstance(policy, RecurrentPolicy)
    views, size = policy.layout.views(learner.parameters), policy.observation_size
    memory = torch.zeros(2, 8, policy.memory_size)
    begins = torch.ones(2, 8, dtype=torch.bool)
    for _ in range(2):
        trajectories, _ = learner.collect(np.ones(2, bool))
        learner.updates_done += 1
        after = []
        for t in range(16):
            inputs = torch.from_numpy(trajectories.observations[:, t])
            assert torch.equal(inputs[..., -1] > 0, begins)
            expected = torch.where(begins[..., None], torch.zeros_like(memory), memory)
            torch.testing.assert_close(inputs[..., size:-1], expected, rtol=1e-5, atol=1e-6)
            _, memory = policy.act_and_remember(views, inputs)
            after.append(memory)
            begins = torch.from_numpy(trajectories.terminated[:, t] | trajectories.truncated[:, t])
        assert trajectories.cuts
        for cut in trajectories.cuts:
            remembered = after[cut.t][cut.client, cut.copy].numpy()
            np.testing.assert_allclose(cut.observation[size:-1], remembered, rtol=1e-5, atol=1e-6)
            assert cut.observation[-1] == 0
    learner.close()


def test_a_minibatch_is_whole_sequences_and_gives_what_was_collected() -> None:
    """At the old parameters the sequences' log-probabilities and values are the batch's own."""
    learner = learner_of()
    trajectories, _ = learner.collect(np.ones(2, bool))
    stack, policy = learner.stacks[0], learner.policy
    batch = make_batch(policy, stack.views, trajectories, stack.rows, critic=True)
    targets = LearningTargets(batch.rewards, batch.rewards, torch.ones_like(batch.rewards))
    packed = PackedBatch.of(batch, targets, batch.distribution.flatten(1, 2), sequences=True)
    for count in (2, 3):
        seen = 0.0
        for part in packed.minibatches([1, 2], np.zeros(2, np.int64), 1, count):
            assert part.observations.shape[2:] == (16, policy.input_size)
            output = policy.forward(stack.views, part.observations)
            real = part.weights > 0
            log_probs = policy.distribution.log_prob(output.distribution, part.actions)
            torch.testing.assert_close(log_probs[real], part.log_probs[real], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(output.values[real], part.values[real], rtol=1e-5, atol=1e-5)
            kl = policy.distribution.kl(part.distribution, output.distribution)
            assert kl[real].abs().max() < 1e-6
            seen += float(part.weights.sum()) / count
        assert seen == pytest.approx(2 * 8 * 16)
    learner.close()


def test_a_client_learns_the_same_alone_and_goes_on_bit_for_bit() -> None:
    scenario = Scenario.loads(RECALL)
    tasks = resolve_gym_tasks(scenario)
    together, alone = StackedLearner(tasks, scenario), StackedLearner(tasks[:1], scenario)
    together.train(256)
    alone.train(256)
    torch.testing.assert_close(together.parameters[0], alone.parameters[0], rtol=1e-4, atol=1e-5)
    again = learner_of()
    again.load([together.state(row) for row in range(2)])
    together.train(256)
    again.train(256)
    assert torch.equal(together.parameters, again.parameters)
    for learner in (together, alone, again):
        learner.close()


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.preset=trpo"],
        ["objective.preset=grpo", "group.size=2", "normalise.observations=true"],
        ["policy.memory=lstm", "policy.torso=shared", "trust.region=penalty", "trust.reference=shared"],
    ],
    ids=["natural", "group", "lstm"],
)
def test_every_kind_of_update_learns_with_a_memory(overrides: list[str]) -> None:
    learner = learner_of(*overrides)
    before = learner.parameters.clone()
    learner.train(256)
    assert learner.parameters.isfinite().all()
    moved = learner.policy.layout.views((learner.parameters - before).abs())
    assert moved["torso.memory.weight_hh"].max() > 0
    learner.close()


def learned_recall(memory: str, seed: int) -> float:
    """Return what clients have learned of remembering a bit for three and four steps, the lower of the two."""
    sizes = ["policy.units=16", "rollout.num_envs=16", "rollout.horizon=10", "rollout.episode_limit=0"]
    overrides = [f"policy.memory={memory}", f"seed={seed}", "objective.learning_rate=0.02", *sizes]
    learner = learner_of(*overrides, "clients.1.kwargs={ delay = 4 }")
    learner.train(12 * 160)
    evaluations = learner.evaluate(100)
    learner.close()
    return min(evaluation.score for evaluation in evaluations)


def test_a_memory_learns_what_a_policy_without_one_cannot() -> None:
    """Without a memory nothing is better than to guess, which gives 0 on average; seeds fixed beforehand."""
    assert [learned_recall("gru", seed) for seed in (1400, 1401)] == [1, 1]
    assert learned_recall("none", 1400) < 0.5


def test_a_saved_policy_remembers_as_the_learners_does(tmp_path: Path) -> None:
    """Played step by step by `predict`, the episodes of an evaluation have the returns that it gave."""
    scenario = Scenario.loads(
        RECALL,
        overrides=[
            "rounds=1",
            "evaluate.episodes=8",
            "clients=[{ name = 'short', env = 'grpo_fed/Recall-v0', kwargs = { delay = 3 } }]",
        ],
    )
    train(scenario, tmp_path)
    policy = load_network(tmp_path, "short")
    observations = [np.array([1, 0], np.float32), *[np.zeros(2, np.float32)] * 2, np.array([0, 1], np.float32)]
    first = [policy.predict(seen) for seen in observations]
    assert policy._actor.memory.shape == (1, 1, 16)
    memory = policy._actor.memory.copy()
    policy.forget()
    assert [policy.predict(seen) for seen in observations] == first
    assert np.array_equal(policy._actor.memory, memory)
    assert np.array_equal(policy.play(8).scores, policy.play(8).scores)


def test_what_does_not_fit_a_memory_is_refused_with_the_cure() -> None:
    with pytest.raises(ScenarioError, match=r"objective\.minibatches = 9 must be at most 8"):
        Scenario.loads(RECALL, overrides=["objective.minibatches=9"])
    with pytest.raises(ScenarioError, match="has no memory: show it some frames at once"):
        Scenario.loads(RECALL, overrides=["policy.kind=cnn"])
