"""Interrupted episodes are continued, by env copies of every kind, from seeds and actions."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from grpo_fed.tasks.envs import ClientEnvs, make_client_envs
from grpo_fed.tasks.envs.action_log import ActionLog
from grpo_fed.tasks.envs.vector import VectorEnvs
from tests.support.toy_envs import assert_equal_steps, make_tasks

ALL_COPIES = slice(None)


def make_envs(num_envs: int, *ids: str) -> ClientEnvs:
    tasks = make_tasks(*({"name": f"c{k}", "env": env} for k, env in enumerate(ids)))
    return make_client_envs(tasks, num_envs, episode_limit=13)


def make_user_vector_envs() -> ClientEnvs:
    """Env copies of a vector environment of gymnasium's, with autoreset off: it may not be stepped once done."""
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.DISABLED)
    return VectorEnvs(env, make_tasks({"name": "c0", "env": "CartPole-v1"}), squash=False, episode_limit=13)


KINDS: dict[str, Callable[[], ClientEnvs]] = {
    "single": lambda: make_envs(4, "CartPole-v1"),
    "family": lambda: make_envs(4, "grpo_fed/CartPole-v1"),
    "mixed": lambda: make_envs(2, "CartPole-v1", "grpo_fed/CartPole-v1", "CartPole-v1"),
    "vector": make_user_vector_envs,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 12, 13, 40])
def test_resumed_env_copies_continue_bit_for_bit(kind: str, steps: int) -> None:
    """After `steps` random steps, other env copies continue; the next 30 steps of both are equal bit for bit."""
    rng = np.random.default_rng(steps)
    first, second = KINDS[kind](), KINDS[kind]()
    seeds = rng.integers(0, 2**63, first.size, dtype=np.uint64)
    observations = first.reset(seeds)
    log, episodes = ActionLog(first.size, 1), np.zeros(first.size, np.int64)
    for _ in range(steps):
        actions = rng.integers(0, 2, (first.size, 1)).astype(np.float32)
        step = first.step(actions)
        observations, done = step.observations, step.terminated | step.truncated
        log.add(actions[None], done[None])
        episodes += done
    copied_log = ActionLog.of(log.actions(ALL_COPIES))
    assert np.array_equal(second.resume(seeds, episodes, copied_log.actions(ALL_COPIES)), observations)
    for _ in range(30):
        actions = rng.integers(0, 2, (first.size, 1)).astype(np.float32)
        assert_equal_steps(first.step(actions), second.step(actions))


def test_the_action_log_holds_the_actions_of_running_episodes_only() -> None:
    """Three pieces of two steps for two env copies; an episode of copy 0 ends in step 3, one of copy 1 in step 1."""
    log = ActionLog(2, 1)
    for piece, ends in enumerate(([[False, False], [False, True]], [[False, False], [True, False]], [[False] * 2] * 2)):
        log.add(np.full((2, 2, 1), piece, np.float32), np.array(ends))
    first, second = log.actions(ALL_COPIES)
    (second_alone,) = log.actions(slice(1, 2))
    assert np.array_equal(second_alone, second)
    assert first.ravel().tolist() == [2.0, 2.0]
    assert second.ravel().tolist() == [1.0, 1.0, 2.0, 2.0]
    log.add(np.full((2, 2, 1), 3, np.float32), np.array([[False, True], [True, False]]))
    assert [actions.ravel().tolist() for actions in log.actions(ALL_COPIES)] == [[], [3.0]]
