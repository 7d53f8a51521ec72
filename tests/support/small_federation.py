"""A small federation that Flower's engines and ours must end alike, and waiting for what must come."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

ROOT = Path(__file__).parents[2]
CONNECTION = "lab"
CLIENTS = ("ant", "bee", "cat")

TINY = """
name = "tiny"
rounds = 2
steps = 64
seed = 3
device = "cpu"
policy = { hidden = [8] }
rollout = { num_envs = 2, horizon = 32 }
objective = { epochs = 2, minibatches = 2 }
proximity = { mode = "quadratic" }
evaluate = { episodes = 2 }
checkpoint = { keep = 3 }

[[clients]]
name = "ant"
env = "grpo_fed/CartPole-v1"

[[clients]]
name = "bee"
env = "grpo_fed/CartPole-v1"
kwargs = { length = 0.9 }

[[clients]]
name = "cat"
env = "grpo_fed/CartPole-v1"
kwargs = { swap_actions = true }
"""


def tiny() -> Scenario:
    return Scenario.loads(TINY)


def shared(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "checkpoints" / "round-0002" / "shared.safetensors")


def agree(folder: Path, result: Result, local: tuple[Path, Result]) -> None:
    """The same shared blocks after two rounds, to float tolerance; the same clients, with the same returns before."""
    expected = shared(local[0])
    found = shared(folder)
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6)
    assert result.rounds == local[1].rounds
    before = {name: client.before for name, client in result.clients.items()}
    assert before == {name: client.before for name, client in local[1].clients.items()}


def until(true: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)
