"""The clients' environments as the scenario wants them: copies, limits, and a collector with its normalisers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.rl.normalise import ObservationNormaliser, RewardNormaliser
from grpo_fed.rl.rollout import Collector
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import ClientEnvs, EnvCache, episode_step_limit, make_client_envs
from grpo_fed.tasks.gym import find_env_spec
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import cost_key


def make_scenario_envs(tasks: Sequence[GymTask], scenario: Scenario, env_cache: EnvCache | None) -> ClientEnvs:
    """`rollout.num_envs` copies of each client's environment, which read costs where the objective limits them."""
    rollout, key = scenario.rollout, cost_key(scenario)
    squash, limit, episodes = scenario.policy.squash, rollout.episode_limit, scenario.evaluate.episodes
    return make_client_envs(tasks, rollout.num_envs, squash, limit, env_cache, key, episodes)


def make_collector(
    tasks: Sequence[GymTask],
    seeds: Sequence[int],
    policy: StackedPolicy,
    scenario: Scenario,
    env_cache: EnvCache | None,
) -> Collector:
    """The clients' environments with the normalisers that the scenario wants.

    ValueError where episodes must begin alike and an environment resets itself.
    """
    envs = make_scenario_envs(tasks, scenario, env_cache)
    if scenario.objective.advantage == "group" and scenario.group.by == "start" and not envs.reproducible:
        envs.close()
        task = next(task for task in tasks if find_env_spec(task).entry_point is None)
        raise ValueError(
            f'client {task.client}: group.by = "start" needs episodes with a given start state, and {task.env} resets'
            " itself: set another group.by, or give its vector environment AutoresetMode.DISABLED"
        )
    settings, clients = scenario.normalise, len(tasks)
    copies, gamma = scenario.rollout.num_envs, scenario.objective.gamma
    scales = np.array([task.reward_scale for task in tasks])
    return Collector(
        envs,
        [task.client for task in tasks],
        seeds,
        policy.distribution,
        ObservationNormaliser(clients, policy.observation_size, settings.clip) if settings.observations else None,
        RewardNormaliser(clients, copies, gamma, settings.clip) if settings.rewards else None,
        policy.memory_size,
        scales.repeat(copies) if (scales != 1).any() else None,
        scenario.rollout.reward_clip,
    )


def episode_step_limits(tasks: Sequence[GymTask], scenario: Scenario) -> np.ndarray:
    """The most steps of an episode of each client, [K]; 0 where nothing truncates episodes.

    ValueError where there is no limit and the objective needs one.
    """
    limits = [episode_step_limit(task, scenario.rollout.episode_limit) for task in tasks]
    settings = scenario.objective
    if 0 in limits and (settings.advantage == "group" or settings.average == "total"):
        task = tasks[limits.index(0)]
        why = (
            'advantage = "group" needs whole ones'
            if settings.advantage == "group"
            else 'average = "total" needs a limit'
        )
        raise ValueError(
            f"client {task.client}: {task.env} may never end an episode, and objective.{why}: set rollout.episode_limit"
        )
    return np.array(limits)
