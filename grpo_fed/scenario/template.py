"""A folder of one's own to begin with: a scenario, a task and a policy, small enough to read and to change."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_fed.scenario.toml.source import ScenarioError

SCENARIO = """\
# Six clients learn to come near a target; each has a wind of its own. A few seconds a run.
#
#   grpo-fed explain scenario.toml     what it will do, in words
#   grpo-fed check scenario.toml       its blocks, groups and sizes
#   grpo-fed run scenario.toml         train it
#
# What is not said here has a default: `grpo-fed config` shows every key.

name = "NAME"
description = "Clients that share what they know of targets, each in its own wind."
method = "grpo"  # or local, fedavg, fedprox, ditto, ...: how clients share and merge
rounds = 20
steps = 1024  # of each client in a round
seed = 0

[policy]
module = "my_policy:Residual"  # the class in my_policy.py; leave it out for a plain network
kwargs = { width = 16 }
shared = ["enter", "torso.*", "actor"]  # the critic stays with each client

[rollout]
num_envs = 8  # copies of its task that a client steps side by side
horizon = 64  # steps of each copy between two updates

[normalise]
rewards = true

[objective]
preset = "ppo"  # or trpo, a2c, grpo, ...: what a client climbs
learning_rate = 1e-3
epochs = 4
minibatches = 4

[merge]
threshold = 0.1  # how far a client's group may lie from the others before it leaves; inf for never

[[clients]]
name = "target"
env = "my_tasks:WindyTarget-v0"  # the id that my_tasks.py registers
count = 6
spread = { wind = [-0.3, 0.3] }  # an argument of the task, evenly over the clients
"""

TASKS = '''\
"""A task: any gymnasium environment that is registered when this module is imported."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Target(gymnasium.Env):
    """Come near a target on a line, by steps of at most one, in a wind that is not seen."""

    observation_space = spaces.Box(-20, 20, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, wind: float = 0.0):
        self.wind = wind

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # all that is random comes from self.np_random
        self.place, self.target = self.np_random.uniform(-3, 3, 2)
        return self._seen(), {}

    def step(self, action):
        self.place = np.clip(self.place + float(action[0]) + self.wind, -20, 20)
        return self._seen(), -abs(self.place - self.target), False, False, {}

    def _seen(self):
        return np.array([self.place, self.target], np.float32)


if "WindyTarget-v0" not in gymnasium.registry:  # a worker process may know it already
    gymnasium.register("WindyTarget-v0", "my_tasks:Target", max_episode_steps=20)
'''

POLICY = '''\
"""A policy: a torch module that is called with the spaces and says two things about flat observations."""

import torch
from torch import nn


class Residual(nn.Module):
    """Its blocks are its modules: enter, torso.0, actor and critic. policy.shared names those that clients share."""

    def __init__(self, observation_space, action_space, width: int = 32):
        super().__init__()
        self.enter = nn.Linear(observation_space.shape[0], width)
        self.torso = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.actor = nn.Linear(width, 2 * action_space.shape[0])  # means, then log standard deviations
        self.critic = nn.Linear(width, 1)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        entered = torch.tanh(self.enter(observations))
        features = entered + self.torso(entered)
        return self.actor(features), self.critic(features).squeeze(-1)
'''


def create_project(folder: Path) -> list[Path]:
    """Make it; the files. ScenarioError where there is something already, which is left as it is."""
    if folder.exists() and not folder.is_dir():
        raise ScenarioError(f"{folder}: is a file; name a folder that is not there yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise ScenarioError(f"{folder}: is not empty; name another, or a folder that is not there yet")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"scenario.toml": SCENARIO.replace("NAME", _name(folder)), "my_tasks.py": TASKS, "my_policy.py": POLICY}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _name(folder: Path) -> str:
    """The folder's, as far as a scenario may be called so."""
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:64].strip("-") or "mine"
