"""Vector environments that reset themselves against single environments that are reset."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from grpo_fed.tasks.envs import ClientEnvs, episode_seed, make_client_envs
from tests.support.toy_envs import (
    NoModeVectorEnv,
    assert_equal_steps,
    counting_task,
    make_task,
    roll_out,
    sample_streams,
)


def collect_transitions(envs: ClientEnvs, actions: np.ndarray, count: int) -> list[list[tuple[Any, ...]]]:
    """Return the first `count` valid transitions of each env copy: before, action, reward, after, terminated."""
    before = envs.reset(sample_streams(envs.size))
    transitions: list[list[tuple[Any, ...]]] = [[] for _ in range(envs.size)]
    for action in actions:
        step = envs.step(action)
        for copy in np.flatnonzero(step.valid):
            after = step.final_observations[copy]
            values = (*before[copy, 1:], *action[copy], step.rewards[copy], *after[1:], step.terminated[copy])
            transitions[copy].append(tuple(float(value) for value in values))
            assert before[copy, 0] == after[0], "both are of one episode"
        before = step.observations
    return [rows[:count] for rows in transitions]


@pytest.mark.parametrize("env", ["Disabled", "SameStep", "NextStep", "OneSeed"])
def test_no_transition_crosses_a_reset(env: str):
    actions = np.full((20, 3, 1), 0.5, np.float32)
    plain = collect_transitions(make_client_envs([counting_task()], 3), actions, 12)
    assert [row[-1] for row in plain[0]] == [0, 0, 1] * 4
    envs = make_client_envs([make_task(f"toys/{env}-v0")], 3)
    assert collect_transitions(envs, actions, 12) == plain
    assert envs.reproducible == (env == "Disabled")


def test_a_vector_environment_that_takes_resets_gets_the_episode_seeds():
    actions, seeds = np.zeros((11, 2, 1), np.float32), sample_streams(2)
    first_plain, steps_plain = roll_out(make_client_envs([counting_task()], 2), actions, seeds)
    first, steps = roll_out(make_client_envs([make_task("toys/Disabled-v0")], 2), actions, seeds)
    np.testing.assert_array_equal(first, first_plain)
    for step, step_plain in zip(steps, steps_plain, strict=True):
        assert_equal_steps(step, step_plain)


@pytest.mark.parametrize("env", ["toys/NextStep-v0", "toys/SameStep-v0"])
def test_a_self_resetting_vector_begins_with_the_first_episode_seeds(env: str):
    seeds = sample_streams(2)
    first = make_client_envs([make_task(env)], 2).reset(seeds)
    np.testing.assert_array_equal(first[:, 0], [episode_seed(int(seed), 0) % 1000 for seed in seeds])


def test_a_single_seed_for_all_copies_depends_on_every_stream():
    envs = make_client_envs([make_task("toys/OneSeed-v0")], 2)
    seeds = np.array([[1, 2], [1, 3], [2, 2], [1, 2]], np.uint64)
    used = [envs.reset(pair)[0, 0] for pair in seeds]
    assert used[0] == used[3]
    assert len(set(used)) == 3


def test_a_vector_environment_must_accept_the_episode_limit():
    with pytest.raises(
        ValueError, match=r"OneSeed-v0: cannot be made with kwargs = {'max_episode_steps': 3}: TypeError"
    ):
        make_client_envs([make_task("toys/OneSeed-v0")], 2, episode_limit=3)


def test_a_vector_environment_must_declare_its_autoreset_mode():
    gymnasium.register("toys/NoMode-v0", vector_entry_point=lambda num_envs: NoModeVectorEnv(num_envs))
    with pytest.warns(UserWarning, match="missing AutoresetMode"):
        task = make_task("toys/NoMode-v0")
    with (
        pytest.warns(UserWarning, match="missing AutoresetMode"),
        pytest.raises(ValueError, match=r"client toy: toys/NoMode-v0: metadata\['autoreset_mode'\] .* is None"),
    ):
        make_client_envs([task], 2)
