"""Updates that are taken back: a ruinous one to the last bit, a good one never, and what it costs to know."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grpo_fed.rl.make import make_learners
from grpo_fed.rl.rollback import BeforeUpdate
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario

SWITCH = """
name = "a"
steps = 128
[policy]
hidden = [8]
[rollout]
num_envs = 8
horizon = 16
[objective]
epochs = 2
minibatches = 2
[[clients]]
name = "switch"
env = "{env}"
count = {count}
"""


class Switch(gymnasium.Env):
    """Four steps; action 1 is rewarded with 1."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.float32([self.np_random.uniform(-1, 1)]), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), float(action), self.steps == 4, False, {}


gymnasium.register("Switch-v0", Switch, max_episode_steps=4)


def learner_of(*overrides: str, count: int = 2, env: str = "Switch-v0") -> StackedLearner:
    (learner,) = make_learners(Scenario.loads(SWITCH.format(count=count, env=env), overrides=overrides))
    assert isinstance(learner, StackedLearner)
    return learner


def prefer(learner: StackedLearner, action: int, by: float = 1.0) -> None:
    """Let the policies prefer an action."""
    learner.policy.layout.views(learner.parameters)["actor.bias"][:, action] += by


BAD = ["objective.learning_rate=1.0", "objective.entropy=-50.0"]
"""An update that makes a policy sure of the action that it prefers, whatever that is worth."""


def test_a_ruinous_update_is_taken_back_to_the_last_bit() -> None:
    learner = learner_of(*BAD, "trust.rollback=0.5", "trust.rollback_episodes=16")
    prefer(learner, 0)  # a return of 1.1, that falls to nearly 0
    before = [learner.state(row) for row in range(2)]
    reports = learner.train(128)
    for row, report in enumerate(reports):
        assert (report.more["trust/rollbacks"], report.more["trust/rollback_episodes"]) == (1.0, 32.0)
        after = learner.state(row)
        for name in ("parameters", "adam.mean", "adam.square", "adam.count"):
            np.testing.assert_array_equal(after[name], before[row][name], name)
        assert after["progress"].tolist() == [128, 1, 128]
    learner.close()


def test_the_same_update_stands_where_the_return_may_fall_so_far() -> None:
    """Returns are between 0 and 4, so no update falls by more than 4; its bits are those of a run without a bound."""
    held, free = learner_of(*BAD, "trust.rollback=4"), learner_of(*BAD)
    for learner in (held, free):
        prefer(learner, 0)
    (report, _), (other, _) = held.train(128), free.train(128)
    assert report.more["trust/rollbacks"] == 0.0
    assert "trust/rollbacks" not in other.more
    assert torch.equal(held.parameters, free.parameters)
    held.close()
    free.close()


def test_only_the_client_whose_return_fell_is_put_back() -> None:
    """The second client prefers the action that is rewarded, and becomes surer of it."""
    learner = learner_of(*BAD, "trust.rollback=0.5")
    bias = learner.policy.layout.views(learner.parameters)["actor.bias"]
    bias[0, 0] += 1.0
    bias[1, 1] += 1.0
    before = learner.parameters.clone()
    reports = learner.train(128)
    assert [report.more["trust/rollbacks"] for report in reports] == [1.0, 0.0]
    assert torch.equal(learner.parameters[0], before[0])
    assert not torch.equal(learner.parameters[1], before[1])
    learner.close()


def test_what_a_client_plays_does_not_depend_on_the_others() -> None:
    given = ["objective.learning_rate=0.05", "trust.rollback=0"]
    text = SWITCH.format(count=1, env="grpo_fed/CartPole-v1").replace('"switch"', '"switch-1"')
    together = learner_of(*given, env="grpo_fed/CartPole-v1")
    (alone,) = make_learners(Scenario.loads(text, overrides=given))
    counts = [learner.train(1280)[-1].more["trust/rollbacks"] for learner in (together, alone)]
    assert counts[0] == counts[1] > 0
    together.close()
    alone.close()


def test_a_policy_that_is_not_finite_is_taken_back_without_playing() -> None:
    learner = learner_of("trust.rollback=1e6")
    learner.train(128)
    (stack,) = learner.stacks
    assert learner.rollback is not None
    before = BeforeUpdate.of(learner.rollback.tensors)
    learner.parameters[1, 3] = math.nan
    stack.adam.square[1, 3] = math.inf
    stack.adam.count[1] += 8
    bad = learner.rollback.take_back(before, np.array([True, True]), learner.updates_done)
    assert bad.tolist() == [False, True]
    assert torch.equal(learner.parameters, before.parameters)
    assert torch.equal(stack.adam.square, before.square)
    assert (stack.adam.count == before.count).all()
    learner.close()


@pytest.mark.parametrize("env", ["Switch-v0", "grpo_fed/CartPole-v1"])
def test_a_resumed_client_ends_with_the_same_bits(env: str) -> None:
    given = ["objective.learning_rate=0.05", "trust.rollback=0", "trust.rollback_episodes=4"]
    whole, first, second = (learner_of(*given, env=env) for _ in range(3))
    for learner in (whole, first):
        learner.train(256)
    second.load([first.state(row) for row in range(2)])
    reports = [learner.train(256) for learner in (whole, second)]
    assert [report.more for report in reports[0]] == [report.more for report in reports[1]]
    assert torch.equal(whole.parameters, second.parameters)
    for learner in (whole, first, second):
        learner.close()
