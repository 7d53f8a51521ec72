"""A small federation on which Flower's engines and the local engine must agree, and a way to wait for processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from grpo_fed.engines.flower.superlink import find_free_port, find_script
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

ROOT = Path(__file__).parents[2]
CONNECTION = "lab"
"""The name of the connection to the deployment in Flower's configuration."""
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
    """Make the scenario: three CartPoles, two rounds, about a second of training."""
    return Scenario.loads(TINY)


def shared_blocks(folder: Path, round: int = 2) -> dict[str, np.ndarray]:
    """Read the shared blocks from the checkpoint after a round."""
    return load_file(folder / "checkpoints" / f"round-{round:04d}" / "shared.safetensors")


def agree(folder: Path, result: Result, local: tuple[Path, Result], round: int = 2) -> None:
    """Assert that a run agrees with one on the local engine.

    The shared blocks after a round agree to float tolerance, and the clients had the same returns before training.
    local: the folder and the result of the run on the local engine.
    """
    local_folder, local_result = local
    expected = shared_blocks(local_folder, round)
    blocks = shared_blocks(folder, round)
    assert blocks.keys() == expected.keys()
    for name in blocks:
        np.testing.assert_allclose(blocks[name], expected[name], atol=2e-6)
    assert result.rounds == local_result.rounds
    before = {name: client.before for name, client in result.clients.items()}
    assert before == {name: client.before for name, client in local_result.clients.items()}


def stock_node_command(
    client: str, superlink: str, authority: Path | None = None, key: Path | None = None
) -> list[str]:
    """Return the command of one of Flower's own nodes, which starts a process for each message."""
    trust = ["--insecure"] if authority is None else ["--root-certificates", str(authority)]
    proof = [] if key is None else ["--auth-supernode-private-key", str(key)]
    own_port, config = str(find_free_port()), f"client={json.dumps(client)}"
    program = find_script("flower-supernode")
    return [program, *trust, *proof, "--superlink", superlink, "--port", own_port, "--node-config", config]


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until a condition is true; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not become true"
        time.sleep(0.1)
