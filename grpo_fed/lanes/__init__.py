"""Lanes: copies of some clients' tasks, stepped side by side, however their environments want to be stepped."""

from __future__ import annotations

from grpo_fed.lanes.base import Lanes, check_finite, episode_seed, limit_of, padded, unfinite
from grpo_fed.lanes.convert import Actions, observer
from grpo_fed.lanes.make import make_lanes
from grpo_fed.lanes.shed import Shed

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
