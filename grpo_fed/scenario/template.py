"""Makes a folder to start a project from: a scenario, a task and a policy, small enough to read and to change."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_fed.scenario.toml.source import ScenarioError

SCENARIO = """\
# Six clients learn to move to a target, each against its own wind. A run takes a few seconds.
#
#   grpo-fed explain scenario.toml     explain in words what it will do
#   grpo-fed check scenario.toml       show its blocks, groups and sizes
#   grpo-fed run scenario.toml         train it
#
# All other keys have defaults: `grpo-fed config` shows every key.

name = "NAME"
description = "Six clients learn to move to a target together, each against its own wind."
method = "grpo"  # how clients share and merge; or local, fedavg, fedprox, ditto, ...
rounds = 20
steps = 1024  # environment steps of each client in a round
seed = 0

[policy]
module = "my_policy:Residual"  # the class in my_policy.py; leave it out for a plain network
kwargs = { width = 16 }
shared = ["enter", "torso.*", "actor"]  # the critic stays with each client

[rollout]
num_envs = 8  # copies of its task that a client steps in parallel
horizon = 64  # steps of each copy between two updates

[normalise]
rewards = true

[objective]
preset = "ppo"  # what a client maximises, and how; or trpo, a2c, grpo, ...
learning_rate = 1e-3
epochs = 4
minibatches = 4

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
    """Move to a target on a line, in steps of at most one, against a wind that is not observed."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = spaces.Box(-20, 20, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, wind: float = 0.0, render_mode: str | None = None):
        self.wind, self.render_mode = wind, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # take all random numbers from self.np_random
        self.position, self.target = self.np_random.uniform(-3, 3, 2)
        return self._observation(), {}

    def step(self, action):
        self.position = np.clip(self.position + float(action[0]) + self.wind, -20, 20)
        return self._observation(), -abs(self.position - self.target), False, False, {}

    def render(self):
        """Draw the target in green and the position in blue; only films need this."""
        picture = np.full((60, 410, 3), 255, np.uint8)
        for place, colour in ((self.target, (0, 140, 90)), (self.position, (0, 90, 180))):
            column = round(205 + 10 * float(place))
            picture[20:40, max(0, column - 4) : column + 5] = colour
        return picture

    def _observation(self):
        return np.array([self.position, self.target], np.float32)


if "WindyTarget-v0" not in gymnasium.registry:  # it may be registered already in a worker process
    gymnasium.register("WindyTarget-v0", "my_tasks:Target", max_episode_steps=20)
'''

POLICY = '''\
"""A policy: a torch module that is made with the spaces and maps flat observations to actions and values."""

import torch
from torch import nn


class Residual(nn.Module):
    """The blocks are the modules: enter, torso.0, actor and critic. policy.shared names those that clients share."""

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
    """Write the files of a new project and return their paths; ScenarioError if the folder is not empty."""
    if folder.exists() and not folder.is_dir():
        raise ScenarioError(f"{folder}: is a file; name a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise ScenarioError(f"{folder}: is not empty; name another, or a folder that does not exist yet")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"scenario.toml": SCENARIO.replace("NAME", _name(folder)), "my_tasks.py": TASKS, "my_policy.py": POLICY}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _name(folder: Path) -> str:
    """Make a scenario's name from the folder's."""
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:64].strip("-") or "mine"
