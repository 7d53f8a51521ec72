"""Small environments whose every number a test can foresee, and functions that step copies of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import ClientEnvs
from grpo_fed.tasks.envs.base import EnvStep
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import resolve_tasks

# Environments --------------------------------------------------------------------------------------------------------


class CountingEnv(gymnasium.Env[Any, Any]):
    """Observes (seed, steps of the episode, last action); each episode terminates in step `last`.

    Step n is rewarded with n, and costs n / 2: the `toll` in its info.
    """

    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, last: int = 3, bound: float = np.inf, fault: str = "") -> None:
        self.last, self.fault = last, fault
        self.action_space = spaces.Box(-bound, bound, (1,), np.float64)
        self.seed = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seed = self.seed + 1 if seed is None else seed % 1000
        self.steps = 0
        if self.fault == "reset":
            raise OSError("out of maps")
        return np.array([self.seed, 0, 0.0]), {"map": self.seed % 3, "name": f"map {self.seed % 3}", "grid": np.eye(2)}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        seen = np.array([self.seed, self.steps, float(action[0])])
        reward: Any = float(self.steps)
        if self.steps == 2:
            if self.fault == "step":
                raise ZeroDivisionError("wheels came off")
            seen = seen[:1] if self.fault == "shape" else seen
            reward = np.array([1.0]) if self.fault == "reward" else reward
        return seen, reward, self.steps == self.last, False, {"map": "of a step", "toll": 0.5 * self.steps}


class SamplingEnv(gymnasium.Env[Any, Any]):
    """Observes samples of a space, and records them."""

    action_space: spaces.Space[Any] = spaces.Discrete(2)
    samples: list[Any] = []  # noqa: RUF012, of the latest instance

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space = space
        SamplingEnv.samples = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(seed)
        return self.step(0)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        SamplingEnv.samples.append(self.observation_space.sample())
        return SamplingEnv.samples[-1], 0.0, False, False, {}


class ActionRecordingEnv(gymnasium.Env[Any, Any]):
    """Records the actions that it is given."""

    observation_space: spaces.Space[Any] = spaces.Box(-1, 1, (1,))
    actions: list[Any] = []  # noqa: RUF012, of the latest instance

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.action_space = space
        ActionRecordingEnv.actions = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space
        ActionRecordingEnv.actions.append(action)
        return np.zeros(1), 0.0, False, False, {}


class RepeatedActions(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Takes every action twice."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        return result if result[2] or result[3] else self.env.step(action)


class OneSeedVectorEnv(VectorEnv[Any, Any, Any]):
    """Copies of CountingEnv that take one seed for all of them, and reset themselves in the next step."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int) -> None:
        self.envs = SyncVectorEnv([CountingEnv] * num_envs)
        self.num_envs = num_envs
        self.observation_space, self.action_space = self.envs.observation_space, self.envs.action_space
        self.single_observation_space = self.envs.single_observation_space
        self.single_action_space = self.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert isinstance(seed, int)
        return self.envs.reset(seed=seed)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        return self.envs.step(actions)


class NoModeVectorEnv(OneSeedVectorEnv):
    """Leaves out of its metadata how it resets."""

    metadata = {}  # noqa: RUF012


def _vector_maker(mode: AutoresetMode) -> Callable[..., VectorEnv[Any, Any, Any]]:
    def make(num_envs: int, max_episode_steps: int = 10**9, **kwargs: Any) -> VectorEnv[Any, Any, Any]:
        def make_single() -> gymnasium.Env[Any, Any]:
            return gymnasium.wrappers.TimeLimit(CountingEnv(**kwargs), max_episode_steps)

        return SyncVectorEnv([make_single] * num_envs, autoreset_mode=mode)

    return make


def register_toy_envs() -> None:
    """Register them as `toys/Counter-v0`, `toys/Limited-v0`, `toys/OneSeed-v0`, and one for each autoreset mode."""
    gymnasium.register("toys/Counter-v0", CountingEnv)
    gymnasium.register("toys/Limited-v0", CountingEnv, max_episode_steps=4)
    for mode in AutoresetMode:
        gymnasium.register(f"toys/{mode.value}-v0", vector_entry_point=_vector_maker(mode))
    gymnasium.register("toys/OneSeed-v0", vector_entry_point=OneSeedVectorEnv)


# Tasks, and stepping them --------------------------------------------------------------------------------------------


def make_tasks(*clients: dict[str, Any], **settings: Any) -> list[GymTask]:
    """Make the tasks of a scenario with these `[[clients]]` and other settings."""
    return resolve_tasks(Scenario.model_validate({"name": "toys", "clients": list(clients), **settings}))


def make_task(env: str, **client: Any) -> GymTask:
    """Make the task of one client, whose name is "toy"."""
    (task,) = make_tasks({"name": "toy", "env": env, **client})
    return task


def counting_task(**kwargs: Any) -> GymTask:
    """Make a task with a CountingEnv."""
    return make_task("toys/Counter-v0", kwargs=kwargs)


def sample_streams(count: int, seed: int = 0) -> np.ndarray:
    """Sample streams of episodes, [count] uint64."""
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def sample_actions(task: GymTask, steps: int, size: int, seed: int = 0) -> np.ndarray:
    """Sample actions [T, L, A] as policies give them."""
    rng = np.random.default_rng(seed)
    shape = (steps, size, task.action.size)
    if task.action.kind == "gaussian":
        return rng.normal(size=shape).astype(np.float32)
    return rng.integers(0, task.action.sizes, shape).astype(np.float32)


def roll_out(envs: ClientEnvs, actions: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, list[EnvStep]]:
    """Reset env copies and take actions [T, L, A]; first observations [L, D] and T steps."""
    return envs.reset(seeds), [envs.step(row) for row in actions]


def assert_equal_steps(step: EnvStep, reference: EnvStep, rows: Any = slice(None)) -> None:
    """Assert that a step equals some rows of a reference, bit for bit."""
    for name, values in vars(step).items():
        expected = getattr(reference, name)
        if values is None:
            assert expected is None, name
        else:
            np.testing.assert_array_equal(values, expected[rows], name)
