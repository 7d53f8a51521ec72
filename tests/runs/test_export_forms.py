"""Networks in forms that other programs open act there as they do here: ONNX, PyTorch, stable-baselines3, numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.numpy import load_file
from torch import nn

from grpo_fed.runs.export import FORMS, export_policy
from grpo_fed.runs.graph_export import GRAPHS
from grpo_fed.runs.policies import LoadedPolicy
from grpo_fed.runs.predictor import Predictor
from tests.support.still_policies import KINDS, draw_observations, still_policy


def expected_actions(ours: LoadedPolicy, observations: np.ndarray) -> np.ndarray:
    """Compute the likeliest actions by our own code, one at a time; they are not all the same."""
    actions = np.stack([np.asarray(ours.predict(observation)) for observation in observations])
    assert np.ptp(actions.reshape(len(actions), -1), 0).any()
    return actions


def assert_equal_actions(actions: np.ndarray, expected: np.ndarray) -> None:
    assert actions.dtype == expected.dtype
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "raw"])
def test_a_predictor_acts_as_the_policy(kind: str, normalised: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ours, observations = still_policy(monkeypatch, tmp_path / "run", kind, normalised), draw_observations()
    actions = Predictor(ours)(torch.from_numpy(observations)).numpy()
    assert_equal_actions(actions, expected_actions(ours, observations))


@pytest.mark.parametrize("kind", ["choices", "squashed"])
def test_onnxruntime_computes_the_same_actions(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ours, observations = still_policy(monkeypatch, tmp_path / "run", kind), draw_observations()
    path, description = export_policy(tmp_path / "run", tmp_path / "out", form="onnx")
    session = onnxruntime.InferenceSession(path)
    outputs = json.loads(description.read_text())["outputs"]
    assert [output.name for output in session.get_outputs()] == outputs
    action, *distribution = session.run(None, {"observation": observations})
    assert_equal_actions(action, expected_actions(ours, observations))
    parameters = np.concatenate(distribution, -1)
    inputs = ours.normaliser.apply_one(0, observations)
    np.testing.assert_allclose(parameters, ours._actor(inputs[None])[0], rtol=1e-5, atol=1e-6)
    (alone, *_) = session.run(None, {"observation": observations[:1]})
    assert_equal_actions(alone, action[:1])


@pytest.mark.parametrize("form", ["torchscript", "torch-export"])
@pytest.mark.parametrize("kind", ["choices", "box"])
@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:DeprecationWarning")
def test_torch_opens_a_graph_with_the_same_actions(
    form: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    ours, observations = still_policy(monkeypatch, tmp_path / "run", kind), draw_observations()
    path, _ = export_policy(tmp_path / "run", tmp_path / "out", form=form)  # type: ignore[arg-type]
    load = {"torchscript": torch.jit.load, "torch-export": lambda path: torch.export.load(path).module()}[form]
    with torch.no_grad():
        action, *distribution = load(path)(torch.from_numpy(observations))
    assert_equal_actions(action.numpy(), expected_actions(ours, observations))
    assert [part.shape for part in distribution] == ([(40, 5)] if kind == "choices" else [(40, 2), (40, 2)])


def test_graphs_need_none_of_our_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    ours, observations = still_policy(monkeypatch, tmp_path / "run", "box"), draw_observations()
    for form in GRAPHS:
        export_policy(tmp_path / "run", tmp_path / form, form=form)  # type: ignore[arg-type]
    np.save(tmp_path / "observations.npy", observations)
    code = """
import sys, numpy, torch, onnxruntime
seen = numpy.load("observations.npy")
found = [onnxruntime.InferenceSession("onnx/one.onnx").run(None, {"observation": seen})[0]]
with torch.no_grad():
    for module in (torch.jit.load("torchscript/one.pt"), torch.export.load("torch-export/one.pt2").module()):
        found.append(module(torch.from_numpy(seen))[0].numpy())
numpy.save("actions.npy", numpy.stack(found))
assert "grpo_fed" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    for actions in np.load(tmp_path / "actions.npy"):
        assert_equal_actions(actions, expected_actions(ours, observations))


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("choice from 0", "hidden = [8, 4]"),
        ("choices from 0", 'hidden = [8, 4], torso = "separate", activation = "relu"'),
        ("box", 'hidden = [8], adapter = 5, activation = "elu"'),
        ("box", 'hidden = [8, 4], adapter = 5, torso = "separate"'),
    ],
)
def test_stable_baselines3_opens_a_policy_with_the_same_actions_and_values(
    kind: str, policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from grpo_fed.runs.sb3_export import _Spaces

    ours, observations = still_policy(monkeypatch, tmp_path / "run", kind, policy=policy), draw_observations()
    _, ppo, statistics = export_policy(tmp_path / "run", tmp_path / "out", form="sb3")
    model = sb3.PPO.load(ppo, device="cpu")
    env = DummyVecEnv([lambda: _Spaces(model.observation_space, model.action_space)])
    normaliser = VecNormalize.load(str(statistics), env)
    assert not normaliser.training
    inputs = normaliser.normalize_obs(observations)
    actions, _ = model.predict(inputs, deterministic=True)
    np.testing.assert_allclose(actions, expected_actions(ours, observations), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        values = model.policy.predict_values(torch.from_numpy(inputs).float())[:, 0]
    theirs = ours.policy.forward(ours.policy.layout.views(ours.parameters), torch.from_numpy(inputs).float()[None])
    torch.testing.assert_close(values, theirs.values[0], rtol=1e-5, atol=1e-6)


def act_in_numpy(folder: Path, observations: np.ndarray) -> np.ndarray:
    """Compute actions from an exported folder as its page in the documentation says, with numpy alone."""
    description = json.loads((folder / "policy.json").read_text())
    arrays = load_file(folder / f"{description['client']}.safetensors")
    hidden = observations.astype(np.float64)
    if normaliser := description["normaliser"]:
        mean, variance = (arrays[normaliser["prefix"] + name] for name in ("mean", "variance"))
        hidden = (hidden - mean) / np.sqrt(variance + normaliser["epsilon"])
        hidden = np.clip(hidden, -normaliser["clip"], normaliser["clip"])
    *layers, last = description["network"]["layers"]
    activation = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}[description["network"]["activation"]]
    for layer in layers:
        hidden = activation(hidden @ arrays[f"{layer}.weight"].T + arrays[f"{layer}.bias"])
    outputs = hidden @ arrays[f"{last}.weight"].T + arrays[f"{last}.bias"]
    action = description["action"]
    if action["kind"] == "gaussian":
        low, high = np.array(action["low"]), np.array(action["high"])
        return low + (np.tanh(outputs) + 1) / 2 * (high - low) if action["squash"] else np.clip(outputs, low, high)
    ends = np.cumsum(action["sizes"])[:-1]
    return np.stack([part.argmax(-1) for part in np.split(outputs, ends, -1)], -1) + np.array(action["start"])


@pytest.mark.parametrize(("kind", "activation"), [("choices", "tanh"), ("box", "relu"), ("squashed", "tanh")])
def test_plain_numpy_computes_the_same_actions_from_the_parameters(
    kind: str, activation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    ours = still_policy(monkeypatch, tmp_path / "run", kind, policy=f'hidden = [8, 4], activation = "{activation}"')
    export_policy(tmp_path / "run", tmp_path / "out")
    observations = draw_observations()
    actions = act_in_numpy(tmp_path / "out", observations)
    np.testing.assert_allclose(actions, expected_actions(ours, observations), rtol=1e-5, atol=1e-6)


# What is refused ------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A module that works when it is stacked, and whose next step no graph can hold: it asks Python each time."""

    asked: Any = staticmethod(lambda: 1)

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Discrete) -> None:
        super().__init__()
        self.actor = nn.Linear(observation_space.shape[0], int(action_space.n))
        self.critic = nn.Linear(observation_space.shape[0], 1)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.asked() == 2:
            raise RuntimeError("it reads a file")
        return self.actor(observations), self.critic(observations).squeeze(-1)


MODULE = 'module = "tests.runs.test_export_forms:Branching"'


@pytest.mark.parametrize(
    ("kind", "policy", "seen", "why"),
    [
        ("choice", "", None, "counts choices from 0"),
        ("switches", "", None, "has a distribution of another form"),
        ("squashed", "", None, "policy.squash = true"),
        ("unbounded", "", None, "takes no actions without bounds"),
        ("whole", "", None, "does not round actions"),
        ("choice from 0", MODULE, None, "a module of your own"),
        ("choice from 0", "", spaces.Discrete(3), "VecNormalize of stable-baselines3 does not normalise"),
        ("choice from 0", "", spaces.Dict({"a": spaces.Box(0, 1, (3,))}), "has no MlpPolicy for observations"),
    ],
)
def test_what_stable_baselines3_cannot_do_is_refused_with_a_cure(
    kind: str, policy: str, seen: Any, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pytest.importorskip("stable_baselines3")
    more = {} if seen is None else {"seen": seen}
    still_policy(monkeypatch, tmp_path / "run", kind, policy=policy or "hidden = [8]", **more)
    with pytest.raises(ValueError, match=f"client one: .*{why}.*; use --to onnx or torch-export"):
        export_policy(tmp_path / "run", tmp_path / "out", form="sb3")
    assert not (tmp_path / "out").exists()


def test_a_module_of_the_users_own_is_written_or_refused_with_a_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import sys

    module = sys.modules.setdefault("tests.runs.test_export_forms", sys.modules[__name__])
    ours, observations = still_policy(monkeypatch, tmp_path / "run", "choice", policy=MODULE), draw_observations()
    path, description = export_policy(tmp_path / "run", tmp_path / "out", form="torch-export")
    action, _ = torch.export.load(path).module()(torch.from_numpy(observations))
    assert_equal_actions(action.detach().numpy(), expected_actions(ours, observations))
    assert json.loads(description.read_text())["network"] == {"module": "tests.runs.test_export_forms:Branching"}
    monkeypatch.setattr(module.Branching, "asked", staticmethod(iter([1, 1, 1, 2]).__next__))
    with pytest.raises(ValueError, match=r"cannot be written with --to torchscript: .*; use --to onnx or torch-export"):
        export_policy(tmp_path / "run", tmp_path / "bad", form="torchscript")
    assert not (tmp_path / "bad").exists()


def test_a_missing_package_and_an_unknown_form_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    still_policy(monkeypatch, tmp_path / "run")
    from grpo_fed.runs import graph_export

    monkeypatch.setattr(graph_export, "ONNX_PACKAGES", ("onnx_of_nobody",))
    with pytest.raises(ValueError, match=r"--to onnx needs .*: pip install 'onnx.*' 'onnxscript.*'"):
        export_policy(tmp_path / "run", tmp_path / "out", form="onnx")
    with pytest.raises(ValueError, match="--to pickle: is no form of a policy; there are safetensors, onnx"):
        export_policy(tmp_path / "run", tmp_path / "out", form="pickle")  # type: ignore[arg-type]


def test_the_names_of_forms_are_those_of_the_command_line():
    from typing import get_args

    from grpo_fed.cli.export import FormName

    assert get_args(FormName) == FORMS
    assert {*GRAPHS, "safetensors", "sb3"} == set(FORMS)
