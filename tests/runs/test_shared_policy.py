"""The shared policy of a run, for a client that was never there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from grpo_fed import Scenario, run
from grpo_fed.cli import app
from grpo_fed.runs.export import export_policy
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


def test_what_is_shared_is_exported_and_acts_as_it_is_played(trained: Path, tmp_path: Path):
    policy = load_shared_policy(trained, "grpo_fed/CartPole-v1", moments_of="bee")
    folder = tmp_path / "graph"
    export_policy(trained, folder, form="torchscript", shared="grpo_fed/CartPole-v1", moments_of="bee")
    with pytest.warns(DeprecationWarning, match="jit.load"):
        graph = torch.jit.load(folder / "newcomer.pt")
    seen = np.random.default_rng(3).normal(0, 0.2, (20, 4)).astype(np.float32)
    actions, _ = graph(torch.from_numpy(seen))
    assert actions.tolist() == [policy.predict(each) for each in seen]
    command = ["export", str(trained), "--shared", "grpo_fed/CartPole-v1", "--moments-of", "bee"]
    written = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "parameters")])
    assert written.exit_code == 0, written.output
    arrays = load_file(tmp_path / "parameters" / "newcomer.safetensors")
    (expected,) = policy.policy.layout.unstack(policy.parameters)
    for name, value in expected.items():
        np.testing.assert_array_equal(arrays[name], value.numpy())
    described = json.loads((tmp_path / "parameters" / "policy.json").read_text())
    assert (described["client"], described["env"]) == ("newcomer", "grpo_fed/CartPole-v1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"client": "ant", "shared": "X-v0"}, "is the policy of a client that was never there; leave out --client ant"),
        ({"client": "ant", "moments_of": "bee"}, "--moments-of bee: is for --shared ENV"),
    ],
)
def test_options_of_export_that_contradict_each_other_are_refused(trained: Path, tmp_path: Path, given, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        export_policy(trained, tmp_path / "none", **given)


def test_a_run_that_shares_a_part_alone_has_no_policy_for_newcomers(tmp_path: Path):
    scenario = Scenario.loads(TINY, overrides=['policy.shared=["torso.*"]', "rounds=1"])
    run(scenario, tmp_path / "run", workers=0)
    with pytest.raises(ValueError, match="has no actor, which this run does not share; name a client"):
        load_shared_policy(tmp_path / "run", "grpo_fed/CartPole-v1")
