"""Learners of other libraries as clients of `grpo_fed.flower.Grouped`: their module, their training, their policy.

    learner.py  TorchLearner: what a client needs of a learner; the KL between two of its policies
    client.py   client_app: a Flower app whose clients are such learners
    memory.py   what a client remembers between rounds: its optimiser, and the states that it measures KL on
    cleanrl.py  the action distribution of an agent in CleanRL's style
    sb3.py      sb3_learner: an on-policy algorithm of stable-baselines3
    torchrl.py  the action distribution of an actor of TorchRL

A learner's parameters are shared by their names, and the KL of a step is measured through its own policy. Begin with
learner.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.adapters.cleanrl import discrete_distribution
    from grpo_fed.adapters.client import ClientInfo, client_app, initial_arrays
    from grpo_fed.adapters.learner import LearnerReport, Memory, TorchLearner
    from grpo_fed.adapters.sb3 import sb3_learner
    from grpo_fed.adapters.torchrl import torchrl_distribution

__all__ = [
    "ClientInfo",
    "LearnerReport",
    "Memory",
    "TorchLearner",
    "client_app",
    "discrete_distribution",
    "initial_arrays",
    "sb3_learner",
    "torchrl_distribution",
]

MODULES = {
    "ClientInfo": "grpo_fed.adapters.client",
    "Memory": "grpo_fed.adapters.learner",
    "TorchLearner": "grpo_fed.adapters.learner",
    "LearnerReport": "grpo_fed.adapters.learner",
    "client_app": "grpo_fed.adapters.client",
    "discrete_distribution": "grpo_fed.adapters.cleanrl",
    "initial_arrays": "grpo_fed.adapters.client",
    "sb3_learner": "grpo_fed.adapters.sb3",
    "torchrl_distribution": "grpo_fed.adapters.torchrl",
}

__getattr__ = lazy_getattr(__name__, MODULES)
