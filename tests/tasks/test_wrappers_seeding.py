"""Seeds for environments that take none."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils import seeding

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario
from grpo_fed.tasks.gym import make_env
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.wrappers import Seeded


class OfOldDays(gymnasium.Env[Any, Any]):
    """Draws its start from a stream that only `seed` begins anew."""

    observation_space = spaces.Box(0, 1, (1,), np.float64)
    action_space = spaces.Discrete(2)

    def seed(self, seed: int) -> list[int]:
        self.np_random, seed = seeding.np_random(seed)
        return [seed]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.np_random.random(1), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.random(1), 0.0, True, False, {}


def test_a_seed_decides_the_episode_of_an_environment_that_takes_none():
    bare, seeded = OfOldDays(), Seeded(OfOldDays())
    assert bare.reset(seed=3)[0] != bare.reset(seed=3)[0]
    first = seeded.reset(seed=3)[0]
    assert seeded.reset(seed=4)[0] != first
    assert seeded.reset(seed=3)[0] == first == np.random.default_rng(3).random(1)
    assert seeded.reset()[0] != first


def test_an_environment_without_a_method_seed_is_refused():
    with pytest.raises(ValueError, match="has no method seed"):
        Seeded(gymnasium.make("CartPole-v1"))


def test_episodes_of_meta_world_are_decided_by_their_seeds_goal_and_all():
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    task = resolve_tasks(Scenario.load(find_scenario("metaworld")))[0]

    def episode(env: Any, seed: int) -> np.ndarray:
        seen, _ = env.reset(seed=seed)
        steps = [np.append(seen, 0.0)]
        for action in np.random.default_rng(seed).uniform(-1, 1, (50, 4)).astype(np.float32):
            seen, reward, *_ = env.step(action)
            steps.append(np.append(seen, reward))
        return np.array(steps)

    one, other = make_env(task), make_env(task)
    first = episode(one, 5)
    goal = slice(36, 39)
    assert not np.array_equal(episode(one, 6)[0, goal], first[0, goal])
    assert np.array_equal(episode(one, 5), first)
    assert np.array_equal(episode(other, 5), first)
