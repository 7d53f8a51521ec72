"""FAMILIES: all families, by the ids that they are registered with at gymnasium."""

from __future__ import annotations

from grpo_fed.tasks.families.acrobot import Acrobot
from grpo_fed.tasks.families.base import Family
from grpo_fed.tasks.families.cartpole import CartPole
from grpo_fed.tasks.families.catch import Catch
from grpo_fed.tasks.families.mountain_car import MountainCar, MountainCarContinuous
from grpo_fed.tasks.families.pendulum import Pendulum
from grpo_fed.tasks.families.point_mass import PointMass
from grpo_fed.tasks.families.random_mdp import RandomMDP
from grpo_fed.tasks.families.recall import Recall

FAMILIES: dict[str, type[Family]] = {
    "grpo_fed/CartPole-v1": CartPole,
    "grpo_fed/Pendulum-v1": Pendulum,
    "grpo_fed/Acrobot-v1": Acrobot,
    "grpo_fed/MountainCar-v0": MountainCar,
    "grpo_fed/MountainCarContinuous-v0": MountainCarContinuous,
    "grpo_fed/PointMass-v0": PointMass,
    "grpo_fed/RandomMDP-v0": RandomMDP,
    "grpo_fed/Catch-v0": Catch,
    "grpo_fed/Recall-v0": Recall,
}
