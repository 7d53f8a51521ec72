"""Which observations are pictures, and where their channels lie; pictures stay uint8 in every kind of envs."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from grpo_fed.tasks.envs import make_client_envs, observation_flattener
from grpo_fed.tasks.pictures import channels_height_width, has_channels_first, picture_shape
from grpo_fed.tasks.task import TaskError
from tests.support.toy_envs import make_task


class Camera(gymnasium.Env[Any, Any]):
    """Shows its step's number as the colour of a picture; an episode has three steps."""

    observation_space = spaces.Box(0, 255, (2, 3, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def __init__(self, dtype: str = "uint8") -> None:
        self.dtype = dtype

    def _see(self) -> np.ndarray:
        return np.full((2, 3, 1), 100 * self.number, self.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.number = 0
        return self._see(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.number += 1
        return self._see(), 1.0, False, self.number == 2, {}


gymnasium.register("toys/Camera-v0", Camera)


def test_boxes_of_uint8_with_two_or_three_axes_are_pictures() -> None:
    assert picture_shape(spaces.Box(0, 255, (84, 84), np.uint8)) == (84, 84)
    assert picture_shape(spaces.Box(0, 255, (84, 84, 3), np.uint8)) == (84, 84, 3)
    for other in (
        spaces.Box(0, 1, (84, 84)),
        spaces.Box(0, 255, (6,), np.uint8),
        spaces.Box(0, 255, (4, 84, 84, 3), np.uint8),
        spaces.Discrete(3),
    ):
        assert picture_shape(other) == ()


def test_channels_lie_on_the_shorter_end() -> None:
    assert channels_height_width((84, 96)) == (1, 84, 96)
    assert channels_height_width((84, 96, 3)) == (3, 84, 96)
    assert channels_height_width((4, 84, 96)) == (4, 84, 96)
    assert [has_channels_first(shape) for shape in ((84, 96), (84, 96, 3), (4, 84, 96))] == [False, False, True]


@pytest.mark.parametrize("env", ["toys/Camera-v0", "grpo_fed/Catch-v0"])
def test_pictures_stay_uint8(env: str) -> None:
    task = make_task(env)
    envs = make_client_envs([task], 3)
    first = envs.reset(np.arange(3, dtype=np.uint64))
    step = envs.step(np.ones((3, 1)))
    assert {each.dtype for each in (first, step.observations, step.final_observations)} == {np.dtype(np.uint8)}
    assert first.shape == (3, task.observation_size)
    assert observation_flattener(task)(task.observation_space.sample()).dtype == np.uint8
    envs.close()


def test_two_kinds_of_envs_with_equal_pictures_are_stepped_together() -> None:
    """An environment in a loop beside a family's in one call: Catch with a wrapper is stepped alone."""
    wrapped = make_task("grpo_fed/Catch-v0", wrappers=["grpo_fed.tasks.wrappers:NegatedReward"])
    envs = make_client_envs([make_task("grpo_fed/Catch-v0"), wrapped], 2)
    assert envs.reset(np.arange(4, dtype=np.uint64)).dtype == np.uint8
    assert envs.step(np.ones((4, 1))).observations.dtype == np.uint8
    envs.close()


def test_a_truncated_episode_ends_with_its_own_picture() -> None:
    envs = make_client_envs([make_task("toys/Camera-v0")], 1)
    envs.reset(np.zeros(1, np.uint64))
    envs.step(np.zeros((1, 1)))
    step = envs.step(np.zeros((1, 1)))
    assert step.truncated[0]
    assert (step.final_observations == 200).all()
    assert (step.observations == 0).all()
    envs.close()


def test_a_picture_of_floats_is_refused() -> None:
    """Rounded to uint8 it would be black."""
    envs = make_client_envs([make_task("toys/Camera-v0", kwargs={"dtype": "float32"})], 1)
    with pytest.raises(TaskError, match="an observation is float32; its space is uint8"):
        envs.reset(np.zeros(1, np.uint64))
    envs.close()
