"""A saved policy does what the fleet's did; a file that is not one is refused."""

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
from grpo_fed.rl.stacked_learner import make_learners
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
LIFE: list[tuple[Any, Any]] = []
"""What the environments below showed, and what was done then."""


class Diary(gymnasium.Env[Any, Any]):
    """Shows random observations, and writes them and the actions down."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, kind: str, render_mode: str | None = None) -> None:
        self.observation_space, self.action_space = SPACES[kind]
        self.render_mode = render_mode
        self.step_number = 0

    def look(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.seen = self.observation_space.sample()
        return self.seen

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_number = 0
        return self.look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        LIFE.append((self.seen, np.array(action)))
        self.step_number += 1
        return self.look(), float(np.sum(action)), self.step_number == 12, False, {}

    def render(self) -> Any:
        return np.full((30, 40, 3), 20 * self.step_number, np.uint8)


@pytest.fixture(autouse=True)
def diary():
    for kind in SPACES:
        gymnasium.register(f"diary/{kind}-v0", Diary, kwargs={"kind": kind})
    LIFE.clear()
    yield
    for kind in SPACES:
        del gymnasium.registry[f"diary/{kind}-v0"]


def scenario(env: str, *overrides: str) -> Scenario:
    text = f"""
    name = "diary"
    rounds = 1
    steps = 64
    evaluate.episodes = 2
    policy = {{ hidden = [8], orthogonal = false, log_std = -1.0 }}
    rollout = {{ num_envs = 1, horizon = 64 }}
    objective = {{ epochs = 2, minibatches = 1, learning_rate = 0.1 }}
    [[clients]]
    name = "other"
    env = "{env}"
    [[clients]]
    name = "writer"
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
def test_a_saved_policy_takes_the_actions_that_the_fleets_policy_took(tmp_path: Path, kind: str, deterministic: bool):
    space, *overrides = KINDS[kind]
    given = scenario(f"diary/{space}-v0", *overrides)
    train(given, tmp_path)
    saved = load_policy(tmp_path, "writer")
    (fleet,) = make_learners(given)
    fleet.train(given.steps)
    LIFE.clear()
    (_, played) = fleet.evaluate(deterministic=deterministic)
    fleets = LIFE[1::2]  # the two clients take turns
    LIFE.clear()
    again = saved.play(deterministic=deterministic)
    assert len(LIFE) == len(fleets) == 24
    np.testing.assert_array_equal(again.scores, played.scores)
    for (seen, action), (seen_again, action_again) in zip(fleets, LIFE, strict=True):
        np.testing.assert_equal(seen_again, seen)
        np.testing.assert_allclose(action_again, action, rtol=1e-6)
        if deterministic:
            predicted = saved.predict(seen)
            assert saved.task.action_space.contains(predicted)
            np.testing.assert_allclose(predicted, action, rtol=1e-6)


def test_predicted_actions_are_sampled_from_the_generator_given(tmp_path: Path):
    train(scenario("diary/box-v0"), tmp_path)
    saved = load_policy(tmp_path, "writer")
    seen = saved.task.observation_space.sample()
    drawn = [saved.predict(seen, deterministic=False, generator=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert (saved.predict(seen, deterministic=False) != saved.predict(seen, deterministic=False)).any()


def test_a_runs_own_evaluation_can_be_played_again_and_another_seed_plays_others(tmp_path: Path):
    given = scenario("grpo_fed/CartPole-v1", "rollout.num_envs=4", "rollout.horizon=16", "evaluate.episodes=6")
    result = train(given, tmp_path)
    saved = load_policy(tmp_path, "writer")
    assert saved.play().score == result.clients["writer"].after
    assert saved.play(deterministic=False).score == result.clients["writer"].sampled
    assert len(saved.play(episodes=9).scores) == 9
    assert (saved.play(seed=5, deterministic=False).scores != saved.play(deterministic=False).scores).any()


# Films ----------------------------------------------------------------------------------------------------------------


def test_a_film_shows_the_first_episode_that_is_played(tmp_path: Path):
    train(scenario("diary/discrete-v0"), tmp_path)
    saved = load_policy(tmp_path, "writer")
    made = film(saved, tmp_path / "writer.gif")
    assert (made.score, made.length) == (saved.play().scores[0], 12)
    with Image.open(tmp_path / "writer.gif") as gif:
        assert made.frames == gif.n_frames == 7  # of 50 steps a second 25 are shown: 0, 2, ..., 12
        assert gif.size == (240, 180 + 24)
        shades = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            shades.append(gif.convert("RGB").getpixel((80, 60))[0])
        assert gif.info["duration"] == 2000
    assert shades == [0, 40, 80, 120, 160, 200, 240]


def test_the_same_film_of_sampled_actions_is_made_twice_and_another_seed_makes_another(tmp_path: Path):
    train(scenario("diary/discrete-v0"), tmp_path)
    saved = load_policy(tmp_path, "writer")
    scores = [film(saved, tmp_path / "a.gif", False, seed).score for seed in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]
    assert scores[0] == saved.play(deterministic=False, seed=1).scores[0]


@pytest.mark.parametrize(
    ("name", "what"), [("writer.png", "must end in .gif"), ("nowhere/writer.gif", "there is no folder")]
)
def test_a_film_that_cannot_be_written_is_refused_before_it_is_played(tmp_path: Path, name: str, what: str):
    train(scenario("diary/discrete-v0"), tmp_path)
    saved = load_policy(tmp_path, "writer")
    LIFE.clear()
    with pytest.raises(ValueError, match=what):
        film(saved, tmp_path / name)
    assert not LIFE


def test_an_environment_that_cannot_be_drawn_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(scenario("diary/discrete-v0"), tmp_path)
    monkeypatch.setattr(Diary, "render", lambda self: None)
    with pytest.raises(ValueError, match=r"client writer: diary/discrete-v0 cannot be drawn: .* \[height, width, 3\]"):
        film(load_policy(tmp_path, "writer"), tmp_path / "a.gif")


# What is no saved policy ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    given = scenario("grpo_fed/CartPole-v1", "normalise.observations=true")
    fleets = make_learners(given)
    Recorder(given, tmp_path, "cpu").open(lambda record: None)
    for fleet in fleets:
        save_policies(tmp_path, fleet)
    return tmp_path


def change(run: Path, change: Any) -> None:
    path = run / "policies" / "writer.safetensors"
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
def test_a_file_that_does_not_fit_is_refused(run: Path, name: str):
    change(run, CHANGES[name][0])
    with pytest.raises(ValueError, match=rf"writer\.safetensors: does not fit .*scenario\.toml: .*{CHANGES[name][1]}"):
        load_policy(run, "writer")


def test_a_normaliser_that_the_scenario_does_not_speak_of_is_refused(run: Path):
    text = (run / "scenario.toml").read_text()
    (run / "scenario.toml").write_text(text.replace("observations = true", "observations = false"))
    with pytest.raises(ValueError, match=r"normalise\.observations = false"):
        load_policy(run, "writer")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_called_damaged(run: Path, length: int):
    path = run / "policies" / "writer.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"writer\.safetensors: is damaged, or no policy"):
        load_policy(run, "writer")


def test_what_is_not_there_is_said_with_what_was_meant(run: Path):
    with pytest.raises(ValueError, match="has several clients, name one of them: other, writer"):
        load_policy(run)
    with pytest.raises(ValueError, match="has no client wirter; did you mean writer"):
        load_policy(run, "wirter")
    with pytest.raises(ValueError, match=r"policies: no run folder: there is no scenario\.toml in it"):
        load_policy(run / "policies", "writer")
    with pytest.raises(ValueError, match="nope: no run folder: there is no such folder"):
        load_policy(run / "nope", "writer")
    (run / "policies" / "writer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"writer\.safetensors: there is no such file; did the run end before"):
        load_policy(run, "writer")
    assert read_client_names(run) == ["other", "writer"]


@pytest.mark.parametrize(
    ("observation", "what"),
    [
        (np.zeros(3), r"an observation of shape \(3,\)"),
        (np.zeros((1, 4)), r"an observation of shape \(1, 4\)"),
        ("north", "no observation from Box"),
        (np.array([0, 0, np.nan, 0]), "not finite"),
    ],
)
def test_what_is_no_observation_of_the_task_is_refused(run: Path, observation: Any, what: str):
    saved = load_policy(run, "writer")
    assert isinstance(saved, LoadedPolicy)
    with pytest.raises(ValueError, match=rf"client writer: grpo_fed/CartPole-v1: .*{what}"):
        saved.predict(observation)
