"""Weights of the entropy that adapt to a target: numbers by hand, groups of actions, runs that reach it."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grpo_fed.rl.client_stack import ENTROPY_WEIGHTS
from grpo_fed.rl.entropy_target import LEAST, MOST, EntropyTargets, adapt_multipliers
from grpo_fed.rl.make import make_learners
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import ObjectiveSettings

MDP = """
name = "a"
rounds = 40
steps = 512
[policy]
hidden = [16]
[rollout]
num_envs = 8
horizon = 32
[objective]
learning_rate = 5e-3
epochs = 4
minibatches = 2
[[clients]]
name = "table"
env = "grpo_fed/RandomMDP-v0"
count = 2
"""


class TwoSwitches(gymnasium.Env):
    """Both switches should be on: one of two positions, and one of three."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), float(action[0] == 1) + float(action[1] == 2), self.steps == 4, False, {}


gymnasium.register("TwoSwitches-v0", TwoSwitches)


def learner_of(text: str, *overrides: str) -> StackedLearner:
    (learner,) = make_learners(Scenario.loads(text, overrides=overrides))
    assert isinstance(learner, StackedLearner)
    return learner


def test_a_multiplier_moves_by_the_exponential_of_what_is_missing() -> None:
    """0.2 exp(0.5 (0.6 - 0.4)) = 0.2 e^0.1 = 0.221034; 0.2 exp(0.5 (0.6 - 1)) = 0.2 e^-0.2 = 0.163746."""
    found = adapt_multipliers(torch.tensor([[0.2], [0.2]]), torch.tensor([[0.4], [1.0]]), torch.tensor([0.6]), 0.5)
    assert found.flatten().tolist() == pytest.approx([0.221034, 0.163746], abs=1e-6)


def test_a_multiplier_stays_within_its_limits_and_where_nothing_is_known() -> None:
    entropies = torch.tensor([[50.0, -50.0, math.nan]])
    found = adapt_multipliers(torch.full((1, 3), 0.1), entropies, torch.zeros(3), 1.0)
    torch.testing.assert_close(found, torch.tensor([[LEAST, MOST, 0.1]]))


def test_groups_of_components_have_weights_of_their_own() -> None:
    """Group a is components 0 and 2 with entropies 0.1 + 0.3; b is component 3; component 1 has a fixed weight."""
    settings = ObjectiveSettings(
        entropy_groups={"a": [0, 2], "b": [3]}, entropy_target={"a": 0.6, "b": 0.5}, entropy_rate=1.0
    )
    targets = EntropyTargets.of(settings, 4, torch.device("cpu"))
    assert targets is not None
    first = targets.first_weights(torch.tensor([0.0, 0.0, 0.0, 0.05]))
    assert first.tolist() == pytest.approx([0.01, 0.0, 0.01, 0.05])
    entropies = torch.tensor([[0.1, 9.0, 0.3, 0.7]])
    adapted = targets.adapt(first[None], entropies, 1.0)
    a, b = 0.01 * math.exp(0.2), 0.05 * math.exp(-0.2)
    assert adapted[0].tolist() == pytest.approx([a, 0.0, a, b])
    metrics = {key: value.item() for key, value in targets.metrics(adapted, entropies).items()}
    assert metrics == pytest.approx(
        {"entropy/a": 0.4, "entropy/b": 0.7, "entropy_multiplier/a": a, "entropy_multiplier/b": b}
    )


def test_a_number_is_for_all_components_together() -> None:
    targets = EntropyTargets.of(ObjectiveSettings(entropy_target=1), 2, torch.device("cpu"))
    assert targets is not None
    adapted = targets.adapt(torch.tensor([[0.1, 0.1]]), torch.tensor([[0.25, 0.25]]), 2.0)
    assert adapted[0].tolist() == pytest.approx([0.1 * math.e] * 2)


def test_the_first_update_of_a_run_uses_the_adapted_weight() -> None:
    """The first policy of this network is nearly uniform: its entropy is log 3 to four digits."""
    learner = learner_of(MDP, "objective.entropy_target=0.5", "objective.entropy_rate=0.7", "objective.entropy=0.2")
    (report, _) = learner.train(1)
    assert report.more["entropy/action"] == pytest.approx(math.log(3), abs=1e-3)
    expected = 0.2 * math.exp(0.7 * (0.5 - report.more["entropy/action"]))
    assert report.metrics()["entropy_multiplier/action"] == pytest.approx(expected, rel=1e-5)
    assert learner.state(0)[ENTROPY_WEIGHTS].tolist() == pytest.approx([expected], rel=1e-5)
    learner.close()


def test_the_entropy_ends_at_its_target() -> None:
    """Two clients with each of three seeds. Over the last ten rounds; without a target it ends below 0.15."""

    def last_entropies(seed: int, *overrides: str) -> np.ndarray:
        learner = learner_of(MDP, f"seed={seed}", *overrides)
        rounds = [[report.losses["entropy"] for report in learner.train(512)] for _ in range(40)]
        learner.close()
        return np.mean(rounds[-10:], 0)

    assert (last_entropies(900) < 0.15).all()
    for seed in (900, 901, 902):
        held = last_entropies(seed, "objective.entropy_target=0.5", "objective.entropy_rate=1.0")
        assert np.abs(held - 0.5).max() < 0.06


TARGET = ["objective.entropy_target=0.9", "objective.entropy_rate=1.0"]


def test_a_clients_weight_does_not_depend_on_the_others() -> None:
    together = learner_of(MDP, *TARGET)
    alone = learner_of(MDP.replace("table", "table-1").replace("count = 2", ""), *TARGET)
    together.train(512)
    alone.train(512)
    expected = alone.state(0)[ENTROPY_WEIGHTS]
    np.testing.assert_allclose(together.state(1)[ENTROPY_WEIGHTS], expected, rtol=1e-5)
    assert not np.allclose(together.state(0)[ENTROPY_WEIGHTS], expected, rtol=1e-5)
    together.close()
    alone.close()


def test_a_resumed_client_ends_with_the_same_bits() -> None:
    whole, first, second = (learner_of(MDP, *TARGET) for _ in range(3))
    whole.train(512)
    whole.train(512)
    first.train(512)
    second.load([first.state(row) for row in range(2)])
    second.train(512)
    for row in range(2):
        for name, array in whole.state(row).items():
            np.testing.assert_array_equal(second.state(row)[name], array, name)
    for learner in (whole, first, second):
        learner.close()


def test_a_state_of_a_run_without_a_target_begins_with_the_first_weight() -> None:
    without, target = learner_of(MDP), learner_of(MDP, *TARGET)
    without.train(512)
    target.load([without.state(row) for row in range(2)])
    assert target.state(0)[ENTROPY_WEIGHTS].tolist() == pytest.approx([0.01])
    without.close()
    target.close()


def test_sets_of_actions_end_at_their_own_targets() -> None:
    """Without targets both entropies end below 0.2; the second switch alone has one, 0.8 of log 3 = 1.0986 at most."""
    text = MDP.replace("grpo_fed/RandomMDP-v0", "TwoSwitches-v0").replace("count = 2", "")
    sets = ["objective.entropy_groups={ first = [0], second = [1] }", "objective.entropy_target={ second = 0.8 }"]
    learner = learner_of(text, *sets, "objective.entropy_rate=1.0")
    for _ in range(20):
        (report,) = learner.train(512)
    assert report.more["entropy/second"] == pytest.approx(0.8, abs=0.12)
    assert report.losses["entropy"] - report.more["entropy/second"] < 0.2
    assert learner.state(0)[ENTROPY_WEIGHTS][0] == 0.0
    learner.close()


def test_a_target_that_no_policy_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"client table-0: objective.entropy_target = 1.2: .* 1.099 nats at most"):
        learner_of(MDP, "objective.entropy_target=1.2")
    sets = ["objective.entropy_groups={ a = [1] }", "objective.entropy_target={ a = 1.1 }"]
    with pytest.raises(ValueError, match=r"entropy_target.a = 1.1: the entropy of its actions is 1.099"):
        learner_of(MDP.replace("grpo_fed/RandomMDP-v0", "TwoSwitches-v0"), *sets)
