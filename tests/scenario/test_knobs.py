"""No knob does nothing: a scenario with another value ends with other parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from safetensors.numpy import load_file
from torch import Tensor, nn

from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Start, Train
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.stacked_learner import make_learners
from grpo_fed.runs.folder import POLICIES
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.keys import all_keys
from grpo_fed.tasks.resolve import resolve_tasks

SMALL = """
name = "small"
rounds = 2
steps = 64
[policy]
hidden = [4]
[rollout]
num_envs = 4
horizon = 16
[objective]
epochs = 2
minibatches = 2
learning_rate = 0.02
[[clients]]
name = "c"
env = "Reach-v0"
"""


class Reach(gymnasium.Env[Any, Any]):
    """Two numbers to be near to two others, which are one of three pairs; ends in its fifth step or by chance."""

    observation_space: spaces.Space[Any] = spaces.Box(-9, 9, (2,))
    action_space: spaces.Space[Any] = spaces.Box(-1, 1, (2,))

    def __init__(self, far: float = 1.0) -> None:
        self.far = far

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, place = 0, int(self.np_random.integers(3))
        self.goal = self.far * np.array([[3.0, 1.0], [-2.0, 4.0], [0.5, -3.0]], np.float32)[place]
        return self.goal, {"place": place, "half": place // 2}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        ended = self.steps == 5 or self.np_random.random() < 0.2
        return self.goal + self.steps, -float(np.abs(self.goal - action).sum()), ended, False, {}


gymnasium.register("Reach-v0", Reach, max_episode_steps=6)


class Own(nn.Module):
    def __init__(self, observation_space: spaces.Box, action_space: spaces.Box, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(observation_space.shape[0], width), nn.Tanh())
        self.said, self.value = nn.Linear(width, 2 * action_space.shape[0]), nn.Linear(width, 1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(observations)
        return self.said(hidden), self.value(hidden).squeeze(-1)


def halve(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.TransformReward(env, lambda reward: reward / 2 - 1)


PLAIN: list[str] = []
NATURAL, GROUP = ["objective.preset=trpo"], ["objective.preset=grpo", "group.size=2"]
FREE = ["objective.preset=grpo", "group.size=2", "group.by=similarity", "group.clusters=2"]
ADAPTIVE, PENALTY = ["objective.preset=ppo-kl"], ["penalty.weight=0.05"]
OWN = ["personal.model=true", "steps=256", "personal.steps=0.5"]
SPARSE, NESTED = [*PENALTY, "penalty.kind=sparse-group"], [*PENALTY, "penalty.kind=nested"]

CHANGES: dict[str, tuple[list[str], str]] = {
    "steps": (PLAIN, "128"),
    "seed": (PLAIN, "1"),
    "policy.hidden": (PLAIN, "[5]"),
    "policy.activation": (PLAIN, "relu"),
    "policy.torso": (PLAIN, "shared"),
    "policy.adapter": (PLAIN, "3"),
    "policy.squash": (PLAIN, "true"),
    "policy.log_std": (PLAIN, "-1.0"),
    "policy.orthogonal": (PLAIN, "false"),
    "policy.same_start": (PLAIN, "false"),
    "policy.module": (PLAIN, "test_knobs:Own"),
    "policy.kwargs": (["policy.module=test_knobs:Own"], "{ width = 3 }"),
    "policy.blocks": (["trust.blocks={ '*' = 1e-4 }"], "{ all = ['*'] }"),
    "policy.groups": (PENALTY, "{ '*' = 'row' }"),
    "rollout.num_envs": (PLAIN, "2"),
    "rollout.horizon": (PLAIN, "8"),
    "rollout.episode_limit": (PLAIN, "2"),
    "normalise.observations": (PLAIN, "true"),
    "normalise.rewards": (PLAIN, "true"),
    "normalise.clip": (["normalise.observations=true"], "0.5"),
    "objective.preset": (PLAIN, "mdpo"),
    "objective.advantage": (["group.size=2"], "group"),
    "objective.surrogate": (PLAIN, "score"),
    "objective.step": (PLAIN, "natural"),
    "objective.gamma": (PLAIN, "0.5"),
    "objective.gae_lambda": (PLAIN, "0.5"),
    "objective.learning_rate": (PLAIN, "0.01"),
    "objective.schedule": (PLAIN, "linear"),
    "objective.adam_epsilon": (PLAIN, "0.1"),
    "objective.epochs": (PLAIN, "3"),
    "objective.minibatches": (PLAIN, "4"),
    "objective.clip": (PLAIN, "0.01"),
    "objective.clip_high": (PLAIN, "0.01"),
    "objective.clip_schedule": (["objective.clip=0.02"], "linear"),
    "objective.value_coefficient": (PLAIN, "0.1"),
    "objective.value_clip": (PLAIN, "0.01"),
    "objective.value_epochs": (NATURAL, "3"),
    "objective.entropy": (PLAIN, "0.1"),
    "objective.entropy_groups": (
        ["objective.entropy_groups={ a = [0] }", "objective.entropy_weights={ a = 1.0 }"],
        "{ a = [1] }",
    ),
    "objective.entropy_weights": (["objective.entropy_groups={ first = [0] }"], "{ first = 1.0 }"),
    "objective.normalise_advantages": (PLAIN, "off"),
    "objective.average": (PLAIN, "episode"),
    "objective.max_grad_norm": (PLAIN, "0.01"),
    "group.size": (GROUP, "4"),
    "group.by": (GROUP, "task"),
    "group.key": ([*GROUP, "group.by=context", "group.key=place"], "half"),
    "group.clusters": (FREE, "1"),
    "group.score": (GROUP, "rank"),
    "trust.region": (PLAIN, "penalty"),
    "trust.direction": (ADAPTIVE, "new-old"),
    "trust.reference": (["trust.region=penalty", "steps=128"], "shared"),
    "trust.coefficient": (ADAPTIVE, "9.0"),
    "trust.target": (ADAPTIVE, "1.0"),
    "trust.adaptive_target": (NATURAL, "true"),
    "trust.stop": (PLAIN, "1e-4"),
    "trust.blocks": (PLAIN, "{ actor = 1e-5 }"),
    "trust.line_search": ([*NATURAL, "trust.cg_damping=1e-3", "trust.target=1.0"], "false"),
    "trust.cg_iterations": (NATURAL, "1"),
    "trust.cg_damping": (NATURAL, "1.0"),
    "penalty.toward": (PENALTY, "zero"),
    "penalty.weight": (PLAIN, "0.05"),
    "penalty.l1": (SPARSE, "0.01"),
    "penalty.outer": (NESTED, "0.01"),
    "penalty.squared": (PLAIN, "1.0"),
    "penalty.blocks": (PENALTY, "['actor']"),
    "personal.first": (PLAIN, "0.5"),
    "personal.model": (["steps=128"], "true"),
    "personal.pull": (OWN, "0.0"),
    "personal.steps": (OWN, "0.25"),
    "clients.0.name": (PLAIN, "other"),
    "clients.0.env": (PLAIN, "Pendulum-v1"),
    "clients.0.kwargs": (PLAIN, "{ far = 2.0 }"),
    "clients.0.spread": (["clients.0.count=2"], "{ far = [1.0, 2.0] }"),
    "clients.0.wrappers": (PLAIN, "['test_knobs:halve']"),
    "clients.0.learning_rate": (PLAIN, "0.01"),
    "clients.0.entropy": (PLAIN, "0.1"),
    "clients.0.penalty": (PLAIN, "0.05"),
}

ELSEWHERE = {
    "policy.shared": "what a server merges",
    "penalty.kind": "penalty.l1 and penalty.outer need it",
    "clients.count": "how many there are",
}
"""Knobs of these sections that change nothing here."""


def learned(overrides: list[str]) -> np.ndarray:
    """The last client's parameters after two rounds."""
    fleet = make_learners(Scenario.loads(SMALL, overrides=overrides))[-1]
    for begin, end in ((0.0, 0.5), (0.5, 1.0)):
        fleet.train(fleet.scenario.steps, begin, end)
    fleet.close()
    return fleet.parameters[-1].numpy()


def played(overrides: list[str], folder: Path) -> np.ndarray:
    """Those that the last client of a federation plays with, after as much."""
    scenario = Scenario.loads(SMALL, overrides=overrides)
    commons, home = resolve_shared_blocks(scenario), StateStore(folder, durable=False)
    members = Clients(scenario, commons, resolve_tasks(scenario)[-1:], home)
    for round in (1, 2):
        start = Start("run", round, commons.initial.numpy())
        members.answer(dict.fromkeys(members.names, Train(start, (round - 1) / 2, round / 2)))
    members.save_policies(folder, dict.fromkeys(members.names, start))
    members.close()
    (path,) = (folder / POLICIES).iterdir()
    return np.concatenate([array.reshape(-1) for _, array in sorted(load_file(path).items())])


@pytest.mark.parametrize("knob", CHANGES)
def test_another_value_ends_elsewhere(knob: str, tmp_path: Path) -> None:
    base, value = CHANGES[knob]
    if knob.startswith("personal."):
        one, other = played(base, tmp_path / "one"), played([*base, f"{knob}={value}"], tmp_path / "other")
    else:
        one, other = learned(base), learned([*base, f"{knob}={value}"])
    assert not np.array_equal(one, other)


def test_no_knob_of_the_learner_is_left_out() -> None:
    sections = {knob.split(".")[0] for knob in CHANGES if "." in knob}
    every = {".".join(map(str, path)) for path, _ in all_keys(Scenario) if path[0] in sections}
    assert every == {knob.replace("clients.0.", "clients.") for knob in CHANGES if "." in knob} | ELSEWHERE.keys()
