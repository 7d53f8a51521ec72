"""The environment wrappers that scenarios name."""

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
from grpo_fed.tasks.wrappers import Heavy, Ice, Moon, NegatedReward, Seeded

# Rewards -------------------------------------------------------------------------------------------------------------


def test_rewards_are_negated():
    env = NegatedReward(gymnasium.make("CartPole-v1"))
    env.reset(seed=0)
    assert env.step(0)[1] == -1.0


# Physics -------------------------------------------------------------------------------------------------------------


class FakeMujocoModel:
    """The parts of a MuJoCo model that the wrappers change."""

    def __init__(self) -> None:
        self.opt = type("Options", (), {"gravity": np.array([0.0, 0.0, -9.0])})()
        self.body_mass, self.body_inertia = np.array([0.0, 2.0, 4.0]), np.array([[1.0, 1.0, 2.0]])
        self.geom_friction = np.array([[0.4, 0.1, 0.1], [0.8, 0.1, 0.1]])


class FakeMujocoEnv(gymnasium.Env[Any, Any]):
    def __init__(self) -> None:
        self.model = FakeMujocoModel()


def test_each_physics_wrapper_changes_its_own_constants_once():
    moon, heavy, ice = (wrapper(FakeMujocoEnv()).unwrapped.model for wrapper in (Moon, Heavy, Ice))
    np.testing.assert_allclose(moon.opt.gravity, [0, 0, -1.5])
    np.testing.assert_allclose(moon.body_mass, [0, 2, 4])
    np.testing.assert_allclose(heavy.body_mass, [0, 3, 6])
    np.testing.assert_allclose(heavy.body_inertia, [[1.5, 1.5, 3]])
    np.testing.assert_allclose(heavy.opt.gravity, [0, 0, -9])
    np.testing.assert_allclose(ice.geom_friction, [[0.1, 0.1, 0.1], [0.2, 0.1, 0.1]])


def test_an_environment_without_a_mujoco_model_is_refused():
    with pytest.raises(ValueError, match="no MuJoCo model"):
        Moon(gymnasium.make("CartPole-v1"))


def test_a_real_mujoco_model_is_changed():
    pytest.importorskip("mujoco", reason="MuJoCo comes with the extra `mujoco`")
    plain, moon = gymnasium.make("HalfCheetah-v5"), Moon(gymnasium.make("HalfCheetah-v5"))
    np.testing.assert_allclose(moon.unwrapped.model.opt.gravity * 6, plain.unwrapped.model.opt.gravity)
    plain.close()
    moon.close()


# Seeding -------------------------------------------------------------------------------------------------------------


class LegacySeedEnv(gymnasium.Env[Any, Any]):
    """Draws its start from a generator that only the method `seed` seeds."""

    observation_space = spaces.Box(0, 1, (1,), np.float64)
    action_space = spaces.Discrete(2)

    def seed(self, seed: int) -> list[int]:
        self.np_random, seed = seeding.np_random(seed)
        return [seed]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.np_random.random(1), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.np_random.random(1), 0.0, True, False, {}


def test_seeded_determines_episodes_of_an_environment_that_ignores_seeds():
    bare, seeded = LegacySeedEnv(), Seeded(LegacySeedEnv())
    assert bare.reset(seed=3)[0] != bare.reset(seed=3)[0]
    first = seeded.reset(seed=3)[0]
    assert seeded.reset(seed=4)[0] != first
    assert seeded.reset(seed=3)[0] == first == np.random.default_rng(3).random(1)
    assert seeded.reset()[0] != first


def test_an_environment_without_a_seed_method_is_refused():
    with pytest.raises(ValueError, match="has no method seed"):
        Seeded(gymnasium.make("CartPole-v1"))


def test_a_seed_determines_a_meta_world_episode_and_its_goal():
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    task = resolve_tasks(Scenario.load(find_scenario("metaworld")))[0]

    def run_episode(env: Any, seed: int) -> np.ndarray:
        seen, _ = env.reset(seed=seed)
        steps = [np.append(seen, 0.0)]
        for action in np.random.default_rng(seed).uniform(-1, 1, (50, 4)).astype(np.float32):
            seen, reward, *_ = env.step(action)
            steps.append(np.append(seen, reward))
        return np.array(steps)

    env, second_env = make_env(task), make_env(task)
    first = run_episode(env, 5)
    goal = slice(36, 39)
    assert not np.array_equal(run_episode(env, 6)[0, goal], first[0, goal])
    assert np.array_equal(run_episode(env, 5), first)
    assert np.array_equal(run_episode(second_env, 5), first)
