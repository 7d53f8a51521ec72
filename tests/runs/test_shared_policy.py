"""The shared policy of a run, for a client that was never there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_fed import Scenario, run
from grpo_fed.runs.shared_policy import load_shared_policy
from tests.support.small_federation import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the small federation for two rounds."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(Scenario.loads(TINY, overrides=["normalise.observations=true"]), folder, workers=0)
    return folder


def test_what_is_shared_acts_in_a_task_that_no_client_had(trained: Path):
    policy = load_shared_policy(trained, "grpo_fed/CartPole-v1", {"length": 0.3}, moments_of="bee")
    shared = load_file(trained / "checkpoints" / "round-0002" / "shared.safetensors")
    (arrays,) = policy.policy.layout.unstack(policy.parameters)
    for name in ("torso.0.weight", "torso.0.bias", "actor.weight", "actor.bias"):
        np.testing.assert_array_equal(arrays[name].numpy(), shared[name])
    observation = np.array([0.1, -0.2, 0.05, 0.3], np.float32)
    assert policy.normaliser is not None
    inputs = policy.normaliser.apply_one(0, observation)
    hidden = np.tanh(shared["torso.0.weight"] @ inputs + shared["torso.0.bias"])
    scores = shared["actor.weight"] @ hidden + shared["actor.bias"]
    assert policy.predict(observation) == int(np.argmax(scores))
    assert len(policy.play(3).scores) == 3


@pytest.mark.parametrize(
    ("env", "moments_of", "message"),
    [
        ("grpo_fed/CartPole-v1", None, "name whose to take with --moments-of, one of ant, bee, cat"),
        ("grpo_fed/Acrobot-v1", "ant", "torso.0.weight is float32 of shape (8, 4), and the policy here has"),
        ("grpo_fed/CartPole-v1", "dog", "has no client dog"),
    ],
)
def test_what_does_not_fit_is_refused(trained: Path, env: str, moments_of: str | None, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_shared_policy(trained, env, moments_of=moments_of)


def test_a_run_that_shares_a_part_alone_has_no_policy_for_newcomers(tmp_path: Path):
    scenario = Scenario.loads(TINY, overrides=['policy.shared=["torso.*"]', "rounds=1"])
    run(scenario, tmp_path / "run", workers=0)
    with pytest.raises(ValueError, match="has no actor, which this run does not share; name a client"):
        load_shared_policy(tmp_path / "run", "grpo_fed/CartPole-v1")
