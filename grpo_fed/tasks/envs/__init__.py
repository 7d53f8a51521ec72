"""Copies of some clients' tasks, stepped together, however each environment has to be stepped.

    base.py        ClientEnvs, the interface, EnvStep, and what all kinds share
    make.py        make_client_envs: chooses the kinds that fit the tasks
    loop.py        LoopEnvs: single environments, stepped in a loop
    vector.py      VectorEnvs, AutoresetEnvs: gymnasium's vector environments
    mixed.py       MixedEnvs: several kinds as one
    conversion.py  ActionConverter, flatteners: between an environment's spaces and flat arrays
    cache.py       EnvCache: idle environments, by client
    action_log.py  ActionLog: the actions of running episodes, with which they are continued

Begin with base.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.tasks.envs.base import (
        ClientEnvs,
        EnvStep,
        check_finite,
        episode_seed,
        episode_step_limit,
        non_finite_error,
        pad_actions,
    )
    from grpo_fed.tasks.envs.cache import EnvCache
    from grpo_fed.tasks.envs.conversion import ActionConverter, make_action_converter, observation_flattener
    from grpo_fed.tasks.envs.make import make_client_envs, name_levels

__all__ = [
    "ActionConverter",
    "ClientEnvs",
    "EnvCache",
    "EnvStep",
    "check_finite",
    "episode_seed",
    "episode_step_limit",
    "make_action_converter",
    "make_client_envs",
    "name_levels",
    "non_finite_error",
    "observation_flattener",
    "pad_actions",
]

MODULES = {
    "ActionConverter": "grpo_fed.tasks.envs.conversion",
    "ClientEnvs": "grpo_fed.tasks.envs.base",
    "EnvCache": "grpo_fed.tasks.envs.cache",
    "EnvStep": "grpo_fed.tasks.envs.base",
    "check_finite": "grpo_fed.tasks.envs.base",
    "episode_seed": "grpo_fed.tasks.envs.base",
    "episode_step_limit": "grpo_fed.tasks.envs.base",
    "make_action_converter": "grpo_fed.tasks.envs.conversion",
    "make_client_envs": "grpo_fed.tasks.envs.make",
    "name_levels": "grpo_fed.tasks.envs.make",
    "non_finite_error": "grpo_fed.tasks.envs.base",
    "observation_flattener": "grpo_fed.tasks.envs.conversion",
    "pad_actions": "grpo_fed.tasks.envs.base",
}

__getattr__ = lazy_getattr(__name__, MODULES)
