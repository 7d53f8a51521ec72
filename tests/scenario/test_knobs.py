"""Every knob has an effect: a scenario with another value ends with other parameters."""

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
from grpo_fed.policy.shared_names import POLICIES
from grpo_fed.rl.make import make_learners
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
    """Match one of three pairs of numbers with two actions; an episode ends in its fifth step or by chance."""

    observation_space: spaces.Space[Any] = spaces.Box(-9, 9, (2,))
    action_space: spaces.Space[Any] = spaces.Box(-1, 1, (2,))

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, index = 0, int(self.np_random.integers(3))
        self.goal = self.scale * np.array([[3.0, 1.0], [-2.0, 4.0], [0.5, -3.0]], np.float32)[index]
        return self.goal, {"index": index, "half": index // 2}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        ended = self.steps == 5 or self.np_random.random() < 0.2
        costs = {"cost": float(action[0] > 0), "heat": float(np.square(action).sum())}
        return self.goal + self.steps, -float(np.abs(self.goal - action).sum()), ended, False, costs


gymnasium.register("Reach-v0", Reach, max_episode_steps=6)


class UserModule(nn.Module):
    def __init__(self, observation_space: spaces.Box, action_space: spaces.Box, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(observation_space.shape[0], width), nn.Tanh())
        self.actor, self.critic = nn.Linear(width, 2 * action_space.shape[0]), nn.Linear(width, 1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(observations)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def halve_rewards(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.TransformReward(env, lambda reward: reward / 2 - 1)


def round_rewards(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    return gymnasium.wrappers.TransformReward(env, lambda reward: round(reward / 12))


DEFAULT: list[str] = []
NATURAL, GROUP = ["objective.preset=trpo"], ["objective.preset=grpo", "group.size=2"]
SIMILARITY = ["objective.preset=grpo", "group.size=2", "group.by=similarity", "group.clusters=2"]
EQUAL = [*GROUP, "objective.average=step", "clients.0.wrappers=['tests.scenario.test_knobs:round_rewards']"]
ADAPTIVE, PENALTY = ["objective.preset=ppo-kl"], ["penalty.weight=0.05"]
PERSONAL = ["personal.model=true", "steps=256", "personal.steps=0.5"]
SPARSE, NESTED = [*PENALTY, "penalty.kind=sparse-group"], [*PENALTY, "penalty.kind=nested"]
CHANGED = ["clients.0.changes=[{ round = 2, kwargs = { scale = 2.0 } }]"]
LEVELS = [
    "clients.0.curriculum.ranges={ scale = [0.5, 3.0] }",
    *(f"clients.0.curriculum.{value}" for value in ("target=-20", "levels=4", "episodes=1", "step=1.0")),
    "clients.0.curriculum.start={ scale = [0.9, 1.1] }",
]
SCHEDULE, RETURN, EXPANDING, LEARNABILITY = (
    [*LEVELS, f"clients.0.curriculum.kind={kind}"] for kind in ("schedule", "return", "expanding", "learnability")
)
GROWN = [*EXPANDING, "clients.0.curriculum.target=-1e9"]

CHANGES: dict[str, tuple[list[str], str]] = {
    "steps": (DEFAULT, "128"),
    "seed": (DEFAULT, "1"),
    "policy.encoder": (["policy.kind=cnn", "clients.0.env=grpo_fed/Catch-v0"], "impala"),
    "policy.memory": (DEFAULT, "gru"),
    "policy.units": (["policy.memory=lstm"], "5"),
    "policy.hidden": (DEFAULT, "[5]"),
    "policy.activation": (DEFAULT, "relu"),
    "policy.torso": (DEFAULT, "shared"),
    "policy.adapter": (DEFAULT, "3"),
    "policy.squash": (DEFAULT, "true"),
    "policy.log_std": (DEFAULT, "-1.0"),
    "policy.orthogonal": (DEFAULT, "false"),
    "policy.same_start": (DEFAULT, "false"),
    "policy.module": (DEFAULT, "tests.scenario.test_knobs:UserModule"),
    "policy.kwargs": (["policy.module=tests.scenario.test_knobs:UserModule"], "{ width = 3 }"),
    "policy.blocks": (["trust.blocks={ '*' = 1e-4 }"], "{ all = ['*'] }"),
    "policy.freeze": (DEFAULT, "['torso.*']"),
    "policy.groups": (PENALTY, "{ '*' = 'row' }"),
    "rollout.num_envs": (DEFAULT, "2"),
    "rollout.horizon": (DEFAULT, "8"),
    "rollout.episode_limit": (DEFAULT, "2"),
    "rollout.reward_scale": (DEFAULT, "0.1"),
    "rollout.reward_clip": (DEFAULT, "2.0"),
    "normalise.observations": (DEFAULT, "true"),
    "normalise.rewards": (DEFAULT, "true"),
    "normalise.clip": (["normalise.observations=true"], "0.5"),
    "objective.preset": (DEFAULT, "mdpo"),
    "objective.advantage": (["group.size=2"], "group"),
    "objective.surrogate": (DEFAULT, "score"),
    "objective.step": (DEFAULT, "natural"),
    "objective.gamma": (DEFAULT, "0.5"),
    "objective.gae_lambda": (DEFAULT, "0.5"),
    "objective.learning_rate": (DEFAULT, "0.01"),
    "objective.schedule": (DEFAULT, "linear"),
    "objective.adam_epsilon": (DEFAULT, "0.1"),
    "objective.epochs": (DEFAULT, "3"),
    "objective.minibatches": (DEFAULT, "4"),
    "objective.ratio": ([*GROUP, "objective.learning_rate=0.05", "objective.minibatches=1"], "episode"),
    "objective.clip": (DEFAULT, "0.01"),
    "objective.clip_high": (DEFAULT, "0.01"),
    "objective.clip_schedule": (["objective.clip=0.02"], "linear"),
    "objective.value_coefficient": (DEFAULT, "0.1"),
    "objective.value_clip": (DEFAULT, "0.01"),
    "objective.value_epochs": (NATURAL, "3"),
    "objective.entropy": (DEFAULT, "0.1"),
    "objective.entropy_groups": (
        ["objective.entropy_groups={ a = [0] }", "objective.entropy_weights={ a = 1.0 }"],
        "{ a = [1] }",
    ),
    "objective.entropy_weights": (["objective.entropy_groups={ first = [0] }"], "{ first = 1.0 }"),
    "objective.entropy_target": (DEFAULT, "9.0"),
    "objective.entropy_rate": (["objective.entropy_target=9"], "2.0"),
    "objective.cost.limit": (["objective.cost.limit=0.5"], "0.1"),
    "objective.cost.rate": (["objective.cost.limit=0.5"], "0.5"),
    "objective.cost.key": (["objective.cost.limit=0.5"], "heat"),
    "objective.normalise_advantages": (DEFAULT, "off"),
    "objective.average": (DEFAULT, "episode"),
    "objective.max_grad_norm": (DEFAULT, "0.01"),
    "group.size": (GROUP, "4"),
    "group.by": (GROUP, "task"),
    "group.key": ([*GROUP, "group.by=context", "group.key=index"], "half"),
    "group.clusters": (SIMILARITY, "1"),
    "group.score": (GROUP, "rank"),
    "group.equal": (EQUAL, "skip"),
    "trust.region": (DEFAULT, "penalty"),
    "trust.direction": (ADAPTIVE, "new-old"),
    "trust.reference": (["trust.region=penalty", "steps=128"], "shared"),
    "trust.coefficient": (ADAPTIVE, "9.0"),
    "trust.target": (ADAPTIVE, "1.0"),
    "trust.adaptive_target": (NATURAL, "true"),
    "trust.rollback": (["objective.learning_rate=0.5"], "0.0"),
    "trust.rollback_episodes": (["objective.learning_rate=0.5", "trust.rollback=0", "steps=256"], "1"),
    "trust.stop": (DEFAULT, "1e-4"),
    "trust.blocks": (DEFAULT, "{ actor = 1e-5 }"),
    "trust.line_search": ([*NATURAL, "trust.cg_damping=1e-3", "trust.target=1.0"], "false"),
    "trust.cg_iterations": (NATURAL, "1"),
    "trust.cg_damping": (NATURAL, "1.0"),
    "penalty.step": (PENALTY, "decoupled"),
    "penalty.toward": (PENALTY, "zero"),
    "penalty.weight": (DEFAULT, "0.05"),
    "penalty.l1": (SPARSE, "0.01"),
    "penalty.outer": (NESTED, "0.01"),
    "penalty.squared": (DEFAULT, "1.0"),
    "penalty.blocks": (PENALTY, "['actor']"),
    "personal.first": (DEFAULT, "0.5"),
    "personal.inner_rate": (DEFAULT, "0.1"),
    "personal.model": (["steps=128"], "true"),
    "personal.pull": (PERSONAL, "0.0"),
    "personal.steps": (PERSONAL, "0.25"),
    "clients.0.name": (DEFAULT, "renamed"),
    "clients.0.env": (DEFAULT, "Pendulum-v1"),
    "clients.0.kwargs": (DEFAULT, "{ scale = 2.0 }"),
    "clients.0.spread": (["clients.0.count=2"], "{ scale = [1.0, 2.0] }"),
    "clients.0.changes.0.round": (CHANGED, "3"),
    "clients.0.changes.0.kwargs": (CHANGED, "{ scale = 3.0 }"),
    "clients.0.curriculum.kind": (LEVELS, "schedule"),
    "clients.0.curriculum.ranges": (LEVELS, "{ scale = [0.5, 2.0] }"),
    "clients.0.curriculum.start": (SCHEDULE, "{ scale = [1.0, 1.1] }"),
    "clients.0.curriculum.until": (SCHEDULE, "1.0"),
    "clients.0.curriculum.target": (RETURN, "1e9"),
    "clients.0.curriculum.floor": (GROWN, "-1e10"),
    "clients.0.curriculum.step": (GROWN, "0.5"),
    "clients.0.curriculum.episodes": (GROWN, "1_000"),
    "clients.0.curriculum.edges": (EXPANDING, "1.0"),
    "clients.0.curriculum.levels": (LEARNABILITY, "8"),
    "clients.0.wrappers": (DEFAULT, "['tests.scenario.test_knobs:halve_rewards']"),
    "clients.0.learning_rate": (DEFAULT, "0.01"),
    "clients.0.entropy": (DEFAULT, "0.1"),
    "clients.0.penalty": (DEFAULT, "0.05"),
    "clients.0.reward_scale": (DEFAULT, "0.1"),
}

EXCEPTIONS = {
    "policy.shared": "determines what a server merges",
    "penalty.kind": "is needed by penalty.l1 and penalty.outer",
    "clients.count": "is the number of clients",
    "clients.curriculum.explore": "needs more than two rounds to tell levels apart, see tests/tasks/test_curriculum.py",
    **{
        f"clients.curriculum.{key}": "needs several levels to replay, see tests/tasks/test_level_replay.py"
        for key in ("temperature", "staleness")
    },
    "clients.curriculum.fade": "counts from the third round on, see tests/tasks/test_curriculum.py",
    **{f"clients.score.{key}": "is for the records, see tests/tasks/test_scores.py" for key in ("random", "reference")},
    "clients.attack": "changes what the server is sent",
    "clients.strength": "changes what the server is sent",
    **{f"{section}.start": "names a file, see tests/policy/test_start.py" for section in ("policy", "clients")},
    **{f"clients.{key}": "is virtual time, see tests/federation/test_buffer.py" for key in ("pace", "jitter")},
    "clients.trains": "determines what a server merges, see tests/federation/test_adaptation.py",
    "policy.kind": "follows from the observations, see tests/policy/test_cnn.py",
    "group.redraws": "is for clients with prompts",
    "trust.estimate": "is for clients with prompts",
    **{
        f"clients.{key}": "is for clients with prompts"
        for key in ("prompts", "eval_prompts", "held_out", "rewards.function", "rewards.weight", "rewards.kwargs")
    },
}
"""Knobs of these sections that do not change what the last client learns alone, and why."""


def train_alone(overrides: list[str]) -> np.ndarray:
    """Return the last client's parameters after two rounds without a server."""
    learner = make_learners(Scenario.loads(SMALL, overrides=overrides))[-1]
    for begin, end in ((0.0, 0.5), (0.5, 1.0)):
        learner.train(learner.scenario.steps, begin, end)
    learner.close()
    return learner.parameters[-1].numpy()


def train_in_federation(overrides: list[str], folder: Path) -> np.ndarray:
    """Return the parameters with which the last client of a federation is evaluated after two rounds."""
    scenario = Scenario.loads(SMALL, overrides=overrides)
    shared_blocks, store = resolve_shared_blocks(scenario), StateStore(folder, durable=False)
    clients = Clients(scenario, shared_blocks, resolve_tasks(scenario)[-1:], store)
    for round in (1, 2):
        start = Start("run", round, shared_blocks.initial.numpy())
        clients.answer(dict.fromkeys(clients.names, Train(start, (round - 1) / 2, round / 2)))
    clients.save_policies(folder, dict.fromkeys(clients.names, start), start.round)
    clients.close()
    (path,) = (folder / POLICIES).iterdir()
    return np.concatenate([array.reshape(-1) for _, array in sorted(load_file(path).items())])


@pytest.mark.parametrize("knob", CHANGES)
def test_another_value_of_a_knob_changes_the_learned_parameters(knob: str, tmp_path: Path) -> None:
    base, value = CHANGES[knob]
    if knob.startswith(("personal.", "clients.0.changes.")):
        before = train_in_federation(base, tmp_path / "before")
        after = train_in_federation([*base, f"{knob}={value}"], tmp_path / "after")
    else:
        before, after = train_alone(base), train_alone([*base, f"{knob}={value}"])
    assert not np.array_equal(before, after)


def test_every_knob_of_the_learner_is_tested() -> None:
    sections = {knob.split(".")[0] for knob in CHANGES if "." in knob}
    all_knobs = {".".join(map(str, path)) for path, _ in all_keys(Scenario) if path[0] in sections}
    assert all_knobs == {knob.replace(".0.", ".") for knob in CHANGES if "." in knob} | EXCEPTIONS.keys()
