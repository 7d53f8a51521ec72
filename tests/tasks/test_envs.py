"""Env copies against plain loops over gymnasium's environments, however these have to be stepped."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.spaces.utils import flatten

from grpo_fed.tasks.envs import check_finite, episode_seed, make_client_envs
from grpo_fed.tasks.gym import make_env
from grpo_fed.tasks.task import TaskError
from tests.support.toy_envs import (
    assert_equal_steps,
    counting_task,
    make_task,
    make_tasks,
    roll_out,
    sample_actions,
    sample_streams,
)

# Seeds of episodes ---------------------------------------------------------------------------------------------------


def test_episode_seeds_are_splitmix64s_upper_bits():
    # from https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [episode_seed(1234567, episode) for episode in range(5)] == [number >> 33 for number in published]
    assert 0 <= episode_seed(2**64 - 1, 2**40) < 2**31


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Blackjack-v1", "FrozenLake-v1", "grpo_fed/CartPole-v1"])
def test_every_episode_equals_a_plain_loop_with_its_seed(env: str):
    task = make_task(env, kwargs={"max_episode_steps": 13})
    seeds = sample_streams(2)
    actions = sample_actions(task, 60, 2)
    first, steps = roll_out(make_client_envs([task], 2), actions, seeds)
    ends = 0
    for copy in range(2):
        plain, episode = make_env(task), 0
        seen, _ = plain.reset(seed=episode_seed(int(seeds[copy]), 0))
        np.testing.assert_array_equal(flatten(task.observation_space, seen).astype(np.float32), first[copy])
        for action, step in zip(actions[:, copy], steps, strict=True):
            native = action if task.action.kind == "gaussian" else int(action[0])
            seen, reward, terminated, truncated, _ = plain.step(native)
            flat = flatten(task.observation_space, seen).astype(np.float32)
            np.testing.assert_array_equal(step.final_observations[copy], flat)
            assert (step.rewards[copy], step.terminated[copy], step.truncated[copy]) == (reward, terminated, truncated)
            assert step.valid[copy]
            if terminated or truncated:
                ends, episode = ends + 1, episode + 1
                seen, _ = plain.reset(seed=episode_seed(int(seeds[copy]), episode))
                flat = flatten(task.observation_space, seen).astype(np.float32)
            np.testing.assert_array_equal(step.observations[copy], flat)
    assert ends > 5


@pytest.mark.parametrize("env", ["CartPole-v1", "grpo_fed/CartPole-v1", "grpo_fed/Pendulum-v1", "toys/Disabled-v0"])
def test_equal_seeds_give_equal_experience_bit_for_bit(env: str):
    task = make_task(env)
    envs = make_client_envs([task], 4)
    actions = sample_actions(task, 60, 4)
    first, steps = roll_out(envs, actions, sample_streams(4))
    roll_out(envs, sample_actions(task, 7, 4, seed=1), sample_streams(4, seed=1))
    first_again, steps_again = roll_out(envs, actions, sample_streams(4))
    np.testing.assert_array_equal(first, first_again)
    for step, step_again in zip(steps, steps_again, strict=True):
        assert_equal_steps(step, step_again)


@pytest.mark.parametrize("env", ["CartPole-v1", "grpo_fed/CartPole-v1", "toys/Disabled-v0"])
def test_an_env_copy_does_not_depend_on_the_others(env: str):
    task = make_task(env)
    actions, seeds = sample_actions(task, 50, 5), sample_streams(5)
    _, steps = roll_out(make_client_envs([task], 5), actions, seeds)
    _, steps_alone = roll_out(make_client_envs([task], 1), actions[:, 3:4], seeds[3:4])
    for step_alone, step in zip(steps_alone, steps, strict=True):
        assert_equal_steps(step_alone, step, slice(3, 4))


# How episodes end ----------------------------------------------------------------------------------------------------


def test_termination_and_truncation_are_separate():
    tasks = make_tasks(
        {"name": "ends", "env": "toys/Counter-v0", "kwargs": {"last": 2}},
        {"name": "cut", "env": "toys/Limited-v0", "kwargs": {"last": 9}},
        {"name": "both", "env": "toys/Limited-v0", "kwargs": {"last": 4}},
        {"name": "neither", "env": "toys/Limited-v0", "kwargs": {"last": 9, "max_episode_steps": -1}},
    )
    _, steps = roll_out(make_client_envs(tasks, 1), np.zeros((4, 4, 1), np.float32), sample_streams(4))
    np.testing.assert_array_equal(
        [step.terminated for step in steps], [[0, 0, 0, 0], [1, 0, 0, 0], [0] * 4, [1, 0, 1, 0]]
    )
    np.testing.assert_array_equal([step.truncated for step in steps], [[0] * 4, [0] * 4, [0] * 4, [0, 1, 1, 0]])
    np.testing.assert_array_equal(steps[3].final_observations[:, 1], [2, 4, 4, 4])
    np.testing.assert_array_equal(steps[3].observations[:, 1], [0, 0, 0, 4])


@pytest.mark.parametrize(("limit", "length"), [(0, 4), (3, 3), (100, 4)])
@pytest.mark.parametrize("env", ["toys/Limited-v0", "toys/Disabled-v0", "toys/NextStep-v0", "toys/SameStep-v0"])
def test_the_smaller_step_limit_cuts_an_episode(env: str, limit: int, length: int):
    task = make_task(env, kwargs={"last": 9, "max_episode_steps": 4})
    envs = make_client_envs([task], 2, episode_limit=limit)
    _, steps = roll_out(envs, np.zeros((length + 3, 2, 1), np.float32), sample_streams(2))
    ends = [step.truncated.tolist() for step in steps]
    assert ends[: length - 1] == [[False, False]] * (length - 1)
    assert ends[length - 1] == [True, True]
    assert not any(step.terminated.any() for step in steps)
    np.testing.assert_array_equal(steps[length - 1].final_observations[:, 1], [length, length])


def test_the_smaller_step_limit_cuts_an_episode_of_a_family():
    tasks = make_tasks(
        {"name": "a", "env": "grpo_fed/Pendulum-v1", "kwargs": {"max_episode_steps": 5}},
        {"name": "b", "env": "grpo_fed/Pendulum-v1"},
    )
    envs = make_client_envs(tasks, 1, episode_limit=7)
    _, steps = roll_out(envs, np.zeros((14, 2, 1), np.float32), sample_streams(2))
    assert [[t + 1 for t in range(14) if steps[t].truncated[copy]] for copy in range(2)] == [[5, 10], [7, 14]]


def test_the_episode_limit_counts_the_steps_of_wrappers():
    task = make_task("toys/Limited-v0", kwargs={"last": 9}, wrappers=["tests.support.toy_envs:RepeatedActions"])
    for limit, expected in ((0, [2, 4]), (1, [1, 2, 3, 4])):
        envs = make_client_envs([task], 1, episode_limit=limit)
        _, steps = roll_out(envs, np.zeros((4, 1, 1), np.float32), sample_streams(1))
        assert [number for number, step in enumerate(steps, 1) if step.truncated[0]] == expected


@pytest.mark.parametrize(
    "env", ["toys/Counter-v0", "toys/Disabled-v0", "toys/NextStep-v0", "toys/SameStep-v0", "toys/OneSeed-v0"]
)
def test_without_restart_a_done_copy_sleeps_until_reset(env: str):
    envs = make_client_envs([make_task(env)], 2)
    first = envs.reset(sample_streams(2))
    actions = np.arange(1.0, 10.0, dtype=np.float32)[:, None, None].repeat(2, 1)
    steps = [envs.step(row, restart=False) for row in actions]
    last = steps[2]
    np.testing.assert_array_equal(last.terminated, [True, True])
    np.testing.assert_array_equal(last.observations, last.final_observations)
    np.testing.assert_array_equal(last.observations, np.stack([first[:, 0], [3, 3], [3, 3]], 1))
    for step in steps[3:]:
        for values in (step.valid, step.terminated, step.truncated, step.rewards):
            assert not values.any()
        np.testing.assert_array_equal(step.observations, last.observations)
        np.testing.assert_array_equal(step.final_observations, last.observations)
    assert not envs.step(actions[0]).valid.any()
    np.testing.assert_array_equal(envs.reset(sample_streams(2)), first)
    assert envs.step(actions[0]).valid.all()


def test_sleeping_copies_do_not_change_the_others():
    actions, seeds = sample_actions(make_task("CartPole-v1"), 40, 3), sample_streams(3)
    for task in (make_task("CartPole-v1"), make_task("grpo_fed/CartPole-v1")):
        envs = make_client_envs([task], 3)
        _, steps = roll_out(envs, actions, seeds)
        envs.reset(seeds)
        awake = np.ones(3, bool)
        for action, expected in zip(actions, steps, strict=True):
            step = envs.step(action, restart=False)
            np.testing.assert_array_equal(step.valid, awake)
            for name in ("final_observations", "rewards", "terminated"):
                np.testing.assert_array_equal(getattr(step, name)[awake], getattr(expected, name)[awake])
            awake &= ~expected.terminated
        assert not awake.all()


# What a step and a reset return --------------------------------------------------------------------------------------


def test_steps_return_arrays_of_their_own():
    for task in (make_task("CartPole-v1"), make_task("grpo_fed/CartPole-v1"), make_task("toys/NextStep-v0")):
        _, steps = roll_out(make_client_envs([task], 2), sample_actions(task, 8, 2), sample_streams(2))
        _, references = roll_out(make_client_envs([task], 2), sample_actions(task, 8, 2), sample_streams(2))
        for step, reference in zip(steps, references, strict=True):
            assert_equal_steps(step, reference)
            for values in vars(step).values():
                if values is not None:
                    values[...] = 0


@pytest.mark.parametrize("env", ["Counter", "Disabled", "NextStep", "SameStep"])
def test_reset_infos_are_those_of_the_latest_resets(env: str):
    envs = make_client_envs([make_task(f"toys/{env}-v0")], 3)
    first = envs.reset(sample_streams(3))
    np.testing.assert_array_equal(envs.reset_infos("map"), first[:, 0] % 3)
    for _ in range(4):
        step = envs.step(np.zeros((3, 1), np.float32))
    np.testing.assert_array_equal(envs.reset_infos("map"), step.observations[:, 0] % 3)
    assert envs.reset_infos("name").tolist() == [f"map {int(seed) % 3}" for seed in step.observations[:, 0]]
    first = envs.reset(sample_streams(3))
    for _ in range(9):
        envs.step(np.zeros((3, 1), np.float32), restart=False)
    np.testing.assert_array_equal(envs.reset_infos("map"), first[:, 0] % 3)


def test_a_reset_info_must_be_a_number_or_text():
    envs = make_client_envs([counting_task()], 2)
    envs.reset(sample_streams(2))
    with pytest.raises(ValueError, match=r"group.key = 'maps': client toy: .*no such key; it has map, name, grid"):
        envs.reset_infos("maps")
    with pytest.raises(ValueError, match=r"group.key = 'grid': client toy: it must be a number or a text; .* ndarray"):
        envs.reset_infos("grid")


# When environments fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("step", "client b: toys/Counter-v0: step of env copy 0 failed: ZeroDivisionError: wheels came off"),
        ("shape", r"step of env copy 0 failed: ValueError: an observation has shape \(1,\); its space has \(3,\)"),
        ("reward", r"step of env copy 0 failed: its reward has shape \(1,\); it must be a number"),
    ],
)
def test_a_failing_step_names_its_client(fault: str, message: str):
    tasks = make_tasks(
        {"name": "a", "env": "toys/Counter-v0"},
        {"name": "b", "env": "toys/Counter-v0", "kwargs": {"fault": fault}},
    )
    envs = make_client_envs(tasks, 2)
    for _ in range(2):  # after a reset all copies can be stepped again
        envs.reset(sample_streams(4))
        envs.step(np.zeros((4, 1), np.float32))
        with pytest.raises(TaskError, match=message) as raised:
            envs.step(np.zeros((4, 1), np.float32))
        assert (raised.value.client, raised.value.env) == ("b", "toys/Counter-v0")
        assert raised.value.__cause__ is not None


def test_a_failing_reset_names_its_client():
    envs = make_client_envs([counting_task(), counting_task(fault="reset")], 2)
    with pytest.raises(
        TaskError, match="client toy: toys/Counter-v0: reset of env copy 0 failed: OSError: out of maps"
    ):
        envs.reset(sample_streams(4))


@pytest.mark.parametrize("env", ["toys/Disabled-v0", "toys/NextStep-v0", "toys/SameStep-v0"])
def test_a_failing_vector_environment_names_its_client(env: str):
    envs = make_client_envs([make_task(env, kwargs={"fault": "step"})], 2)
    envs.reset(sample_streams(2))
    envs.step(np.zeros((2, 1), np.float32))
    with pytest.raises(TaskError, match=f"client toy: {env}: step failed: ZeroDivisionError: wheels came off"):
        envs.step(np.zeros((2, 1), np.float32))


def test_a_non_finite_number_names_client_copy_and_step():
    observations, rewards = np.zeros((2, 5, 3, 4), np.float32), np.zeros((2, 5, 3))
    observations[0, 0] = 3e38  # finite, though the sum is not
    check_finite(observations, rewards, ["a", "b"])
    observations[1, 3, 2, 1], observations[0, 4, 0, 0] = np.nan, np.inf
    message = "client b: in env copy 2, at step 3 of this batch, entry 1 of the observation is nan"
    with pytest.raises(ValueError, match=message):
        check_finite(observations, rewards, ["a", "b"])
    rewards[0, 2, 1] = -np.inf
    with pytest.raises(ValueError, match="client a: in env copy 1, at step 2 of this batch, the reward is -inf"):
        check_finite(np.zeros((2, 5, 3, 4)), rewards, ["a", "b"])
