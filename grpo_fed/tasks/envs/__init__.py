"""Lanes: copies of some clients' tasks, stepped side by side, however their environments want to be stepped."""

from __future__ import annotations

from grpo_fed.tasks.envs.base import Lanes, check_finite, episode_seed, limit_of, padded, unfinite
from grpo_fed.tasks.envs.cache import Shed
from grpo_fed.tasks.envs.conversion import Actions, observer
from grpo_fed.tasks.envs.make import make_lanes

__all__ = [
    "Actions",
    "Lanes",
    "Shed",
    "check_finite",
    "episode_seed",
    "limit_of",
    "make_lanes",
    "observer",
    "padded",
    "unfinite",
]
