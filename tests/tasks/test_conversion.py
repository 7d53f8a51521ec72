"""Actions and observations converted between policies and environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from grpo_fed.tasks.envs import ActionConverter, make_client_envs, observation_flattener
from tests.support.toy_envs import (
    ActionRecordingEnv,
    SamplingEnv,
    counting_task,
    make_task,
    roll_out,
    sample_streams,
)

# Actions -------------------------------------------------------------------------------------------------------------


def env_actions(space: spaces.Space[Any], policy_actions: list[list[float]], squash: bool = False) -> list[Any]:
    """Return what an environment is given for the actions of its policy, step by step."""
    gymnasium.registry.pop("toys/Recording-v0", None)
    gymnasium.register("toys/Recording-v0", lambda: ActionRecordingEnv(space))
    envs = make_client_envs([make_task("toys/Recording-v0")], 1, squash)
    roll_out(envs, np.array(policy_actions, np.float32)[:, None], sample_streams(1))
    return ActionRecordingEnv.actions


def test_a_choice_is_counted_from_the_start_of_its_space():
    assert env_actions(spaces.Discrete(3, start=-1), [[0.0], [2.0]]) == [-1, 1]


def test_several_choices_have_the_shape_of_their_space():
    (grid,) = env_actions(spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 0], [1, 1]]), [[1, 2, 3, 4]])
    np.testing.assert_array_equal(grid, [[1, 2], [4, 5]])
    (bits,) = env_actions(spaces.MultiBinary(3), [[1, 0, 1]])
    np.testing.assert_array_equal(bits, [1, 0, 1])


def test_real_actions_are_clipped_to_the_bounds_of_their_box():
    space = spaces.Box(np.array([-1.0, 0.0, -np.inf]), np.array([2.0, np.inf, np.inf]), dtype=np.float64)
    np.testing.assert_allclose(env_actions(space, [[9, 9, 9], [-9, -9, -9]]), [[2, 9, 9], [-1, 0, -9]])
    (unbounded,) = env_actions(spaces.Box(-np.inf, np.inf, (2, 1)), [[1e9, -1e9]])
    np.testing.assert_allclose(unbounded, [[1e9], [-1e9]])
    whole = env_actions(spaces.Box(0, 255, (2,), np.uint8), [[3.4, 300.0], [-2.0, 7.6]])
    np.testing.assert_array_equal(whole, [[3, 255], [0, 8]])


def test_squashed_actions_fill_their_box():
    space = spaces.Box(np.array([-1.0, 10.0], np.float32), np.array([3.0, 10.5], np.float32))
    actions = [[0.0, 0.0], [np.arctanh(0.5), -np.arctanh(0.5)], [50.0, -50.0], [-50.0, 50.0]]
    expected = [[1, 10.25], [2, 10.125], [3, 10], [-1, 10.5]]
    np.testing.assert_allclose(env_actions(space, actions, squash=True), expected, rtol=1e-6)


def test_each_client_has_its_own_box():
    tasks = [make_task("toys/Counter-v0", kwargs={"bound": bound}) for bound in (1.0, 4.0)]
    actions = np.array([[7.0], [-7.0]], np.float32)
    for squash, expected in ((False, [1, -4]), (True, [np.tanh(7), 4 * np.tanh(-7)])):
        envs = make_client_envs(tasks, 1, squash)
        envs.reset(sample_streams(2))
        np.testing.assert_allclose(envs.step(actions).observations[:, 2], expected, rtol=1e-6)


def test_actions_without_bounds_cannot_be_squashed():
    with pytest.raises(ValueError, match=r"policy.squash = true: client toy: entry 0 .* from -inf to inf.*wrapper"):
        make_client_envs([counting_task()], 1, squash=True)
    make_client_envs([make_task("CartPole-v1")], 1, squash=True)


# Observations --------------------------------------------------------------------------------------------------------

SPACES = [
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([2, 3], start=[1, 5]),
    spaces.Box(-1, 1, (2, 3), np.float64),
    spaces.Box(0, 255, (3,), np.uint8),
    spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(-1, 1, (2, 2))}),
    spaces.Tuple((spaces.MultiBinary(2), spaces.Dict({"c": spaces.Discrete(2, start=-1)}))),
]
ONE_OF = spaces.OneOf((spaces.Discrete(3), spaces.Box(-1, 1, (2,))))  # gymnasium batches none


@pytest.mark.parametrize(
    ("space", "vector"),
    [*((space, vector) for space in SPACES for vector in (False, True)), (ONE_OF, False)],
    ids=lambda value: type(value).__name__ if isinstance(value, spaces.Space) else "vector" if value else "single",
)
def test_observations_are_flattened_as_gymnasium_does(space: spaces.Space[Any], vector: bool):
    disabled = AutoresetMode.DISABLED
    entry: dict[str, Any] = {"entry_point": lambda: SamplingEnv(space)}
    if vector:
        entry = {
            "vector_entry_point": lambda num_envs: SyncVectorEnv([lambda: SamplingEnv(space)], autoreset_mode=disabled)
        }
    gymnasium.register("toys/Sampling-v0", **entry)
    envs = make_client_envs([make_task("toys/Sampling-v0")], 1)
    first, steps = roll_out(envs, np.zeros((3, 1, 1), np.float32), sample_streams(1))
    seen = np.concatenate([first, *(step.observations for step in steps)])
    assert seen.dtype == np.float32
    expected = [flatten(space, sample) for sample in SamplingEnv.samples]
    np.testing.assert_array_equal(seen, np.array(expected, np.float32))


def test_a_single_policy_uses_the_same_conversions():
    task = make_task("toys/Counter-v0", kwargs={"bound": 2.0})
    clipped = ActionConverter(task, squash=False)(np.array([[5.0], [1.0], [-5.0]]))
    np.testing.assert_allclose(clipped, [[2.0], [1.0], [-2.0]])
    np.testing.assert_allclose(ActionConverter(task, squash=True)(np.array([[np.arctanh(0.5)]])), [[1.0]])
    flatten_cards, flatten_box = observation_flattener(make_task("Blackjack-v1")), observation_flattener(task)
    cards, box = flatten_cards((20, 7, 1)), flatten_box(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(np.flatnonzero(cards), [20, 32 + 7, 32 + 11 + 1])
    np.testing.assert_array_equal(box, [1.0, 2.0, 3.0])
    assert box.dtype == cards.dtype == np.float32
