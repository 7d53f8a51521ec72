"""Families of tasks of our own. Importing this registers them with gymnasium under `grpo_fed/`."""

from __future__ import annotations

import gymnasium

from grpo_fed.tasks.families.base import Family, Parameter, parameters_of
from grpo_fed.tasks.families.catalogue import FAMILIES
from grpo_fed.tasks.families.environments import FamilyEnv, FamilyVectorEnv

__all__ = ["FAMILIES", "Family", "FamilyEnv", "FamilyVectorEnv", "Parameter", "parameters_of"]

for name, family in FAMILIES.items():
    gymnasium.register(
        name,
        entry_point="grpo_fed.tasks.families.environments:FamilyEnv",
        vector_entry_point="grpo_fed.tasks.families.environments:make_family_vector_env",
        max_episode_steps=family.episode_limit,
        reward_threshold=family.reward_threshold,
        kwargs={"family": name},
    )
