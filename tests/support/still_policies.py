"""Policies that were not trained, of an environment with any spaces, to be written in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from grpo_fed.policy.make import make_policy
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.runs.policies import LoadedPolicy, load_network, save_policy
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

KINDS: dict[str, spaces.Space[Any]] = {
    "choice": spaces.Discrete(4, start=7),
    "choice from 0": spaces.Discrete(4),
    "choices": spaces.MultiDiscrete([2, 3], start=[0, 4]),
    "choices from 0": spaces.MultiDiscrete([2, 3]),
    "switches": spaces.MultiBinary(3),
    "box": spaces.Box(-1, 2, (2,)),
    "squashed": spaces.Box(-1, 2, (2,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (1, 2)),
    "whole": spaces.Box(0, 9, (1, 2), np.int64),
}
"""Spaces of actions."""
SEEN = spaces.Box(-5, 5, (3,))


def still_policy(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    kind: str = "choice",
    normalised: bool = True,
    policy: str = "hidden = [8, 4]",
    seen: spaces.Space[Any] = SEEN,
) -> LoadedPolicy:
    """Write a run's folder with a policy of one client to `folder`, and load the policy.

    kind: of `KINDS`. policy: settings of the policy. seen: the space of observations.
    """

    class Still(gymnasium.Env[Any, Any]):
        observation_space, action_space = seen, KINDS[kind]

    spec = gymnasium.envs.registration.EnvSpec("still/Still-v0", Still)
    monkeypatch.setitem(gymnasium.registry, "still/Still-v0", spec)
    scenario = Scenario.loads(f"""
    name = "still"
    policy = {{ orthogonal = false, squash = {str(kind == "squashed").lower()}, {policy} }}
    normalise = {{ observations = {str(normalised).lower()}, clip = 1.5 }}
    [[clients]]
    name = "one"
    env = "still/Still-v0"
    """)
    (task,) = resolve_tasks(scenario)
    network = make_policy(task, scenario.policy)
    normaliser = ObservationNormaliser(1, task.observation_size, 1.5)
    normaliser.update(np.random.default_rng(3).normal(1.0, 2.0, (1, 100, task.observation_size)))
    folder.mkdir()
    (folder / SCENARIO).write_text(scenario.dumps())
    save_policy(folder, task, network, 3 * network.initial(1), normaliser.state(0) if normalised else None, 0)
    return load_network(folder)


def draw_observations(count: int = 40) -> np.ndarray:
    """Draw observations of `SEEN`, [count, 3] float32."""
    return np.random.default_rng(4).uniform(-5, 5, (count, 3)).astype(np.float32)
