"""Clients with different environments, stepped together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grpo_fed.tasks.envs import make_client_envs
from grpo_fed.tasks.envs.base import EnvStep
from tests.support.toy_envs import assert_equal_steps, make_tasks, roll_out, sample_actions, sample_streams


@pytest.mark.parametrize("env", ["grpo_fed/CartPole-v1", "CartPole-v1", "toys/Disabled-v0"])
def test_clients_with_different_arguments_do_not_affect_each_other(env: str):
    arguments: list[dict[str, Any]] = [{"length": 0.2}, {}, {"length": 1.5, "gravity": 3.0, "swap_actions": True}]
    if env == "CartPole-v1":
        arguments = [{"sutton_barto_reward": True}, {}, {"max_episode_steps": 9}]
    if env == "toys/Disabled-v0":
        arguments = [{"last": 2}, {}, {"last": 7}]
    tasks = make_tasks(*({"name": f"c{n}", "env": env, "kwargs": kwargs} for n, kwargs in enumerate(arguments)))
    actions, seeds = sample_actions(tasks[0], 60, 6), sample_streams(6)
    envs = make_client_envs(tasks, 2)
    assert envs.names == ("c0", "c0", "c1", "c1", "c2", "c2")
    first, steps = roll_out(envs, actions, seeds)
    for client, task in enumerate(tasks):
        rows = slice(2 * client, 2 * client + 2)
        first_alone, steps_alone = roll_out(make_client_envs([task], 2), actions[:, rows], seeds[rows])
        np.testing.assert_array_equal(first_alone, first[rows])
        for step_alone, step in zip(steps_alone, steps, strict=True):
            assert_equal_steps(step_alone, step, rows)


def test_clients_with_different_kinds_of_environments_are_stepped_together():
    tasks = make_tasks(
        {"name": "family", "env": "grpo_fed/CartPole-v1"},
        {"name": "single", "env": "CartPole-v1"},
        {"name": "long", "env": "grpo_fed/CartPole-v1", "kwargs": {"length": 2.0}},
        {"name": "wrapped", "env": "grpo_fed/CartPole-v1", "wrappers": ["gymnasium.wrappers:FlattenObservation"]},
    )
    actions, seeds = sample_actions(tasks[0], 50, 8), sample_streams(8)
    seeds[6:8] = seeds[0:2]
    actions[:, 6:8] = actions[:, 0:2]
    envs = make_client_envs(tasks, 2)
    assert envs.names == tuple(task.client for task in tasks for _ in range(2))
    first, steps = roll_out(envs, actions, seeds)
    np.testing.assert_array_equal(first[6:8], first[0:2])
    for client, task in enumerate(tasks):
        rows = slice(2 * client, 2 * client + 2)
        _, steps_alone = roll_out(make_client_envs([task], 2), actions[:, rows], seeds[rows])
        for step_alone, step in zip(steps_alone, steps, strict=True):
            assert_equal_steps(step_alone, step, rows)
            own = (values if values is None else values[6:8] for values in vars(step).values())
            assert_equal_steps(EnvStep(*own), step, slice(0, 2))


def test_a_familys_shape_arguments_may_be_omitted():
    tasks = make_tasks(
        {"name": "plain", "env": "grpo_fed/RandomMDP-v0"},
        {"name": "same", "env": "grpo_fed/RandomMDP-v0", "kwargs": {"states": 6, "seed": 3}},
    )
    assert make_client_envs(tasks, 2).reset(sample_streams(4)).sum(1).tolist() == [1.0] * 4


def test_tasks_with_different_signatures_cannot_be_stepped_together():
    tasks = make_tasks({"name": "a", "env": "CartPole-v1"}, {"name": "b", "env": "Acrobot-v1"})
    with pytest.raises(ValueError, match=r"clients a and b cannot be stepped together: CartPole-v1 has .*4"):
        make_client_envs(tasks, 2)


def test_reset_infos_of_different_environments_are_joined():
    tasks = make_tasks({"name": "a", "env": "toys/Counter-v0"}, {"name": "b", "env": "toys/NextStep-v0"})
    envs = make_client_envs(tasks, 2)
    first = envs.reset(sample_streams(4))
    assert not envs.reproducible
    np.testing.assert_array_equal(envs.reset_infos("map"), first[:, 0] % 3)
