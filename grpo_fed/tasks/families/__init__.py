"""Parametric tasks that step many env copies in one vectorised call. Importing this registers them with gymnasium.

    base.py          Family, CostlyFamily, the interfaces, and Parameter
    environments.py  FamilyVectorEnv, FamilyEnv: any family as a gymnasium environment
    generators.py    random generators of many episodes, made at once
    noise.py         NoiseStreams: random numbers for many env copies
    catalogue.py     FAMILIES: all families, by gymnasium id
    cartpole.py, pendulum.py, acrobot.py, mountain_car.py, point_mass.py, random_mdp.py, catch.py, recall.py

A family is registered under `grpo_fed/`, for example as `grpo_fed/CartPole-v1`. Begin with base.py.
"""

from __future__ import annotations

import gymnasium

from grpo_fed.tasks.families.base import Family, Parameter, all_parameters
from grpo_fed.tasks.families.catalogue import FAMILIES
from grpo_fed.tasks.families.environments import FamilyEnv, FamilyVectorEnv

__all__ = ["FAMILIES", "Family", "FamilyEnv", "FamilyVectorEnv", "Parameter", "all_parameters"]

for name, family in FAMILIES.items():
    gymnasium.register(
        name,
        entry_point="grpo_fed.tasks.families.environments:FamilyEnv",
        vector_entry_point="grpo_fed.tasks.families.environments:make_family_vector_env",
        max_episode_steps=family.episode_limit,
        reward_threshold=family.reward_threshold,
        kwargs={"family": name},
    )
