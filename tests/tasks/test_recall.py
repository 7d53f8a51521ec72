"""Tasks that need a memory: Recall step by step, and a cart without velocities."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from grpo_fed.tasks.families import FamilyVectorEnv


@pytest.mark.parametrize(("action", "reward"), [(1, 1.0), (0, -1.0)])
def test_a_cue_is_shown_once_and_asked_for_after_the_delay(action: int, reward: float) -> None:
    env = FamilyVectorEnv("grpo_fed/Recall-v0", delay=3.0)
    env.reset(seed=0)
    env.state[:] = [[1.0, 0.0]]
    seen = [env.family.observe(env.state, env.constants)[0].tolist()]
    for step in range(4):
        observations, rewards, terminated, *_ = env.step(np.array([action]))
        seen.append(observations[0].tolist())
        assert rewards[0] == (reward if step == 3 else 0)
        assert terminated[0] == (step == 3)
    assert seen == [[1, 0], [0, 0], [0, 0], [0, 1], [0, 0]]


def test_cues_are_of_either_sign_and_not_in_later_observations() -> None:
    env = FamilyVectorEnv("grpo_fed/Recall-v0", 64)
    first, _ = env.reset(seed=1)
    assert set(first[:, 0].tolist()) == {-1.0, 1.0}
    assert 16 < (first[:, 0] > 0).sum() < 48
    assert not env.step(np.zeros(64, np.int64))[0].any()


def test_a_cart_may_hide_its_velocities_and_moves_the_same() -> None:
    full, hidden = (FamilyVectorEnv("grpo_fed/CartPole-v1", 3, **more) for more in ({}, {"hide_velocities": True}))
    assert hidden.single_observation_space == spaces.Box(
        full.single_observation_space.low[::2], full.single_observation_space.high[::2]
    )
    assert np.array_equal(full.reset(seed=5)[0][:, ::2], hidden.reset(seed=5)[0])
    for action in (0, 1, 1):
        results = [env.step(np.full(3, action)) for env in (full, hidden)]
        assert np.array_equal(results[0][0][:, ::2], results[1][0])
        assert np.array_equal(results[0][1], results[1][1])
