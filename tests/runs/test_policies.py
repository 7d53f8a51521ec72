"""A saved policy acts as the learner's policy did; a file that holds no policy is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.torch
from gymnasium import spaces
from PIL import Image

from grpo_fed.engines.alone import train
from grpo_fed.reports.film import film
from grpo_fed.rl.make import make_learners
from grpo_fed.runs.folder import read_client_names
from grpo_fed.runs.policies import LoadedPolicy, load_policy, save_policies
from grpo_fed.runs.recorder import Recorder
from grpo_fed.scenario.scenario import Scenario

SPACES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "discrete": (spaces.Box(-5, 5, (3,)), spaces.Discrete(4, start=7)),
    "multi": (spaces.Discrete(5, start=-2), spaces.MultiDiscrete([2, 3], start=[0, 4])),
    "box": (spaces.Dict({"a": spaces.Box(-5, 5, (2, 2)), "b": spaces.Discrete(3)}), spaces.Box(-1, 2, (2,))),
    "whole": (spaces.Box(0, 255, (4,), np.uint8), spaces.Box(0, 9, (1, 2), np.int64)),
}
STEPS: list[tuple[Any, Any]] = []
"""Observations that the environments below returned, each with the action that followed."""


class LoggedEnv(gymnasium.Env[Any, Any]):
    """Returns random observations, and logs them with the actions."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, kind: str, render_mode: str | None = None) -> None:
        self.observation_space, self.action_space = SPACES[kind]
        self.render_mode = render_mode
        self.step_number = 0

    def observe(self) -> Any:
        """Sample an observation."""
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.observation = self.observation_space.sample()
        return self.observation

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_number = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        STEPS.append((self.observation, np.array(action)))
        self.step_number += 1
        return self.observe(), float(np.sum(action)), self.step_number == 12, False, {}

    def render(self) -> Any:
        return np.full((30, 40, 3), 20 * self.step_number, np.uint8)


@pytest.fixture(autouse=True)
def logged_envs():
    for kind in SPACES:
        gymnasium.register(f"logged/{kind}-v0", LoggedEnv, kwargs={"kind": kind})
    STEPS.clear()
    yield
    for kind in SPACES:
        del gymnasium.registry[f"logged/{kind}-v0"]


def scenario(env: str, *overrides: str) -> Scenario:
    """Make a scenario of two clients in an environment."""
    text = f"""
    name = "logged"
    rounds = 1
    steps = 64
    evaluate.episodes = 2
    policy = {{ hidden = [8], orthogonal = false, log_std = -1.0 }}
    rollout = {{ num_envs = 1, horizon = 64 }}
    objective = {{ epochs = 2, minibatches = 1, learning_rate = 0.1 }}
    [[clients]]
    name = "first"
    env = "{env}"
    [[clients]]
    name = "second"
    env = "{env}"
    """
    return Scenario.loads(text, overrides=overrides)


KINDS = {
    "discrete": ("discrete",),
    "normalised": ("discrete", "normalise.observations=true"),
    "multi": ("multi",),
    "box": ("box",),
    "squashed": ("box", "policy.squash=true", "normalise.observations=true"),
    "whole": ("whole", "normalise.observations=true"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deterministic", [True, False], ids=["likeliest", "sampled"])
def test_a_saved_policy_takes_the_learners_actions(tmp_path: Path, kind: str, deterministic: bool):
    space, *overrides = KINDS[kind]
    given = scenario(f"logged/{space}-v0", *overrides)
    train(given, tmp_path)
    saved = load_policy(tmp_path, "second")
    (learner,) = make_learners(given)
    learner.train(given.steps)
    STEPS.clear()
    (_, evaluation) = learner.evaluate(deterministic=deterministic)
    expected = STEPS[1::2]  # the two clients take turns
    STEPS.clear()
    replayed = saved.play(deterministic=deterministic)
    assert len(STEPS) == len(expected) == 24
    np.testing.assert_array_equal(replayed.scores, evaluation.scores)
    for (observation, action), (observation_replayed, action_replayed) in zip(expected, STEPS, strict=True):
        np.testing.assert_equal(observation_replayed, observation)
        np.testing.assert_allclose(action_replayed, action, rtol=1e-6)
        if deterministic:
            predicted = saved.predict(observation)
            assert saved.task.action_space.contains(predicted)
            np.testing.assert_allclose(predicted, action, rtol=1e-6)


def test_predicted_actions_are_sampled_with_the_generator(tmp_path: Path):
    train(scenario("logged/box-v0"), tmp_path)
    saved = load_policy(tmp_path, "second")
    saved.task.observation_space.seed(0)
    observation = saved.task.observation_space.sample()
    sampled = [
        saved.predict(observation, deterministic=False, generator=np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    assert (sampled[0] == sampled[1]).all()
    assert (sampled[0] != sampled[2]).any()
    unseeded = [saved.predict(observation, deterministic=False) for _ in range(8)]  # some may be clipped
    assert any((action != unseeded[0]).any() for action in unseeded)


def test_a_saved_policy_repeats_the_runs_evaluation(tmp_path: Path):
    given = scenario("grpo_fed/CartPole-v1", "rollout.num_envs=4", "rollout.horizon=16", "evaluate.episodes=6")
    result = train(given, tmp_path)
    saved = load_policy(tmp_path, "second")
    assert saved.play().score == result.clients["second"].after
    assert saved.play(deterministic=False).score == result.clients["second"].sampled
    assert len(saved.play(episodes=9).scores) == 9
    assert (saved.play(seed=5, deterministic=False).scores != saved.play(deterministic=False).scores).any()


# Films ----------------------------------------------------------------------------------------------------------------


def test_a_film_shows_the_first_episode(tmp_path: Path):
    train(scenario("logged/discrete-v0"), tmp_path)
    saved = load_policy(tmp_path, "second")
    made = film(saved, tmp_path / "second.gif")
    assert (made.score, made.length) == (saved.play().scores[0], 12)
    with Image.open(tmp_path / "second.gif") as gif:
        assert made.frames == gif.n_frames == 7  # of 50 steps a second 25 are shown: 0, 2, ..., 12
        assert gif.size == (240, 180 + 24)
        shades = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            shades.append(gif.convert("RGB").getpixel((80, 60))[0])
        assert gif.info["duration"] == 2000
    assert shades == [0, 40, 80, 120, 160, 200, 240]


def test_films_of_sampled_actions_depend_on_the_seed_alone(tmp_path: Path):
    train(scenario("logged/discrete-v0"), tmp_path)
    saved = load_policy(tmp_path, "second")
    scores = [film(saved, tmp_path / "a.gif", False, seed).score for seed in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]
    assert scores[0] == saved.play(deterministic=False, seed=1).scores[0]


@pytest.mark.parametrize(
    ("name", "what"), [("second.png", "must end in .gif"), ("nowhere/second.gif", "there is no folder")]
)
def test_an_unwritable_film_is_refused_before_the_episode(tmp_path: Path, name: str, what: str):
    train(scenario("logged/discrete-v0"), tmp_path)
    saved = load_policy(tmp_path, "second")
    STEPS.clear()
    with pytest.raises(ValueError, match=what):
        film(saved, tmp_path / name)
    assert not STEPS


def test_an_environment_without_frames_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(scenario("logged/discrete-v0"), tmp_path)
    monkeypatch.setattr(LoggedEnv, "render", lambda self: None)
    with pytest.raises(ValueError, match=r"client second: logged/discrete-v0 cannot be drawn: .* \[height, width, 3\]"):
        film(load_policy(tmp_path, "second"), tmp_path / "a.gif")


# Files without a policy -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    given = scenario("grpo_fed/CartPole-v1", "normalise.observations=true")
    learners = make_learners(given)
    Recorder(given, tmp_path, "cpu").open(lambda record: None)
    for learner in learners:
        save_policies(tmp_path, learner)
    return tmp_path


def change_file(run: Path, change: Any) -> None:
    """Change the arrays in a policy's file."""
    path = run / "policies" / "second.safetensors"
    arrays = safetensors.torch.load(path.read_bytes())
    change(arrays)
    path.write_bytes(safetensors.torch.save(arrays))


CHANGES = {
    "missing": (lambda arrays: arrays.pop("actor.bias"), "actor.bias: missing"),
    "unknown": (
        lambda arrays: arrays.update(actor=arrays["actor.bias"].clone()),
        "actor: not a parameter of this policy",
    ),
    "shape": (
        lambda arrays: arrays.update({"actor.bias": arrays["actor.bias"][:1].clone()}),
        r"float32 of shape \(1,\)",
    ),
    "type": (lambda arrays: arrays.update({"actor.bias": arrays["actor.bias"].double()}), "float64"),
    "nan": (lambda arrays: arrays["actor.bias"].fill_(float("nan")), "not finite"),
    "normaliser": (lambda arrays: arrays.pop("normaliser:mean"), "normaliser: its state has"),
    "negative": (lambda arrays: arrays["normaliser:variance"].fill_(-1.0), "must not be negative"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_policy_that_does_not_fit_is_refused(run: Path, name: str):
    change_file(run, CHANGES[name][0])
    with pytest.raises(ValueError, match=rf"second\.safetensors: does not fit .*scenario\.toml: .*{CHANGES[name][1]}"):
        load_policy(run, "second")


def test_a_normaliser_that_the_scenario_lacks_is_refused(run: Path):
    text = (run / "scenario.toml").read_text()
    (run / "scenario.toml").write_text(text.replace("observations = true", "observations = false"))
    with pytest.raises(ValueError, match=r"normalise\.observations = false"):
        load_policy(run, "second")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_damaged(run: Path, length: int):
    path = run / "policies" / "second.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"second\.safetensors: is damaged, or no policy"):
        load_policy(run, "second")


def test_errors_of_missing_policies_have_a_suggestion(run: Path):
    with pytest.raises(ValueError, match="has several clients, name one of them: first, second"):
        load_policy(run)
    with pytest.raises(ValueError, match="has no client secnod; did you mean second"):
        load_policy(run, "secnod")
    with pytest.raises(ValueError, match=r"policies: no run folder: there is no scenario\.toml in it"):
        load_policy(run / "policies", "second")
    with pytest.raises(ValueError, match="nope: no run folder: there is no such folder"):
        load_policy(run / "nope", "second")
    (run / "policies" / "second.safetensors").unlink()
    with pytest.raises(ValueError, match=r"second\.safetensors: there is no such file; did the run end before"):
        load_policy(run, "second")
    assert read_client_names(run) == ["first", "second"]


@pytest.mark.parametrize(
    ("observation", "what"),
    [
        (np.zeros(3), r"an observation of shape \(3,\)"),
        (np.zeros((1, 4)), r"an observation of shape \(1, 4\)"),
        ("north", "no observation from Box"),
        (np.array([0, 0, np.nan, 0]), "not finite"),
    ],
)
def test_a_value_that_is_no_observation_is_refused(run: Path, observation: Any, what: str):
    saved = load_policy(run, "second")
    assert isinstance(saved, LoadedPolicy)
    with pytest.raises(ValueError, match=rf"client second: grpo_fed/CartPole-v1: .*{what}"):
        saved.predict(observation)
