"""Episodes under way are taken up again, by lanes of every kind, from seeds and actions."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import ClientEnvs, make_client_envs
from grpo_fed.tasks.envs.action_log import ActionLog
from grpo_fed.tasks.envs.vector import VectorEnvs
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.task import Task

EVERY = slice(None)


def tasks(*envs: str) -> list[Task]:
    clients = "".join(f'[[clients]]\nname = "c{k}"\nenv = "{env}"\n' for k, env in enumerate(envs))
    return resolve_tasks(Scenario.loads(f'name = "a"\n{clients}'))


def a_users_own() -> ClientEnvs:
    """Any vector environment with autoreset off, which refuses to step what is over."""
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.DISABLED)
    return VectorEnvs(env, tasks("CartPole-v1"), squash=False, episode_limit=13)


KINDS = {
    "environments": lambda: make_client_envs(tasks("CartPole-v1"), 4, episode_limit=13),
    "a family": lambda: make_client_envs(tasks("grpo_fed/CartPole-v1"), 4, episode_limit=13),
    "unlike ones": lambda: make_client_envs(
        tasks("CartPole-v1", "grpo_fed/CartPole-v1", "CartPole-v1"), 2, episode_limit=13
    ),
    "a vector environment": a_users_own,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 12, 13, 40])
def test_lanes_go_on_as_if_nothing_had_happened(kind: str, steps: int) -> None:
    """After `steps` random steps, other lanes take over; the next 30 steps of both are the same bit for bit."""
    rng = np.random.default_rng(steps)
    first, second = KINDS[kind](), KINDS[kind]()
    seeds = rng.integers(0, 2**63, first.size, dtype=np.uint64)
    seen = first.reset(seeds)
    past, numbers = ActionLog(first.size, 1), np.zeros(first.size, np.int64)
    for _ in range(steps):
        actions = rng.integers(0, 2, (first.size, 1)).astype(np.float32)
        step = first.step(actions)
        seen, done = step.observations, step.terminated | step.truncated
        past.add(actions[None], done[None])
        numbers += done
    assert np.array_equal(second.resume(seeds, numbers, ActionLog.of(past.actions(EVERY)).actions(EVERY)), seen)
    for _ in range(30):
        actions = rng.integers(0, 2, (first.size, 1)).astype(np.float32)
        one, other = first.step(actions), second.step(actions)
        for name, values in vars(one).items():
            assert np.array_equal(values, getattr(other, name)), name


def test_the_past_forgets_what_no_episode_under_way_needs() -> None:
    """Three pieces of two steps for two lanes; lane 0 ended in step 3, lane 1 in step 1."""
    past = ActionLog(2, 1)
    for piece, ends in enumerate(([[False, False], [False, True]], [[False, False], [True, False]], [[False] * 2] * 2)):
        past.add(np.full((2, 2, 1), piece, np.float32), np.array(ends))
    zero, one = past.actions(EVERY)
    (alone,) = past.actions(slice(1, 2))
    assert np.array_equal(alone, one)
    assert zero.ravel().tolist() == [2.0, 2.0]
    assert one.ravel().tolist() == [1.0, 1.0, 2.0, 2.0]
    past.add(np.full((2, 2, 1), 3, np.float32), np.array([[False, True], [True, False]]))
    assert [each.ravel().tolist() for each in past.actions(EVERY)] == [[], [3.0]]
