"""Lanes: copies of some clients' tasks, stepped side by side, however their environments want to be stepped."""

from __future__ import annotations

from grpo_fed.tasks.envs.base import (
    ClientEnvs,
    check_finite,
    episode_seed,
    episode_step_limit,
    non_finite_error,
    pad_actions,
)
from grpo_fed.tasks.envs.cache import EnvCache
from grpo_fed.tasks.envs.conversion import ActionConverter, observation_flattener
from grpo_fed.tasks.envs.make import make_client_envs

__all__ = [
    "ActionConverter",
    "ClientEnvs",
    "EnvCache",
    "check_finite",
    "episode_seed",
    "episode_step_limit",
    "make_client_envs",
    "non_finite_error",
    "observation_flattener",
    "pad_actions",
]
