"""A client with a curriculum is played and filmed at the levels that it has reached, or at those that are chosen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from grpo_fed.cli import app
from grpo_fed.engines.start import run
from grpo_fed.reports import episodes
from grpo_fed.reports.page import write_page
from grpo_fed.rl.scenario_envs import make_scenario_envs
from grpo_fed.runs.played_levels import PlayedLevels, choose_levels, parse_levels, reached_levels
from grpo_fed.runs.policies import load_network
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_gym_tasks

TEXT = """
name = "poles"
rounds = 2
steps = 64
device = "cpu"
policy = { hidden = [4] }
rollout = { num_envs = 4, horizon = 16 }
objective = { epochs = 1, minibatches = 1 }
evaluate = { episodes = 2, step_limit = 60 }
[[clients]]
name = "pole"
env = "grpo_fed/CartPole-v1"
curriculum = { kind = "schedule", ranges = { length = [0.1, 2.1], gravity = [8.0, 12.0] }, \
start = { length = [1.0, 1.2] }, until = 1.0 }
[[clients]]
name = "plain"
env = "grpo_fed/CartPole-v1"
"""
SCENARIO = Scenario.loads(TEXT)
HALFWAY = {"length": (0.55, 1.65), "gravity": (8.0, 12.0)}
"""In the second of two rounds, half of the way from 1.0 and 1.2 to 0.1 and 2.1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poles") / "run"
    run(SCENARIO, folder, workers=0)
    return folder


def last_line(folder: Path) -> dict[str, object]:
    line: dict[str, object] = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
    return line


def play(folder: Path, *arguments: str) -> str:
    shown = CliRunner().invoke(app, ["play", str(folder), *arguments])
    assert shown.exit_code == 0, shown.output
    return shown.output


def test_a_client_has_reached_the_box_of_its_last_round(folder: Path):
    reached = reached_levels(SCENARIO, "pole", last_line(folder))
    assert reached is not None
    assert {name: pytest.approx(edges) for name, edges in reached.box.items()} == HALFWAY
    assert reached.middle == pytest.approx({"length": 1.1, "gravity": 10.0})
    assert str(reached) == "length 0.55 to 1.65, gravity 8 to 12 (the levels of its training in round 2)"
    assert reached_levels(SCENARIO, "plain", last_line(folder)) is None
    unknown = reached_levels(SCENARIO, "pole", None)
    assert unknown is not None
    assert unknown.box == {"length": (0.1, 2.1), "gravity": (8.0, 12.0)}
    assert "does not say which it had reached" in str(unknown)


def test_levels_are_spread_over_a_box_and_stay_where_it_has_no_width():
    levels = PlayedLevels({"length": (1.0, 2.0), "gravity": (9.0, 9.0)}, "").spread(2)
    assert levels == {0: {"length": 1.25, "gravity": 9.0}, 1: {"length": 1.75, "gravity": 9.0}}


def test_a_chosen_level_takes_the_place_of_what_was_reached():
    reached = PlayedLevels(HALFWAY, "the levels of its training in round 2")
    chosen = choose_levels(reached, {"length": 3.0}, "pole")
    assert chosen.box == {"length": (3.0, 3.0), "gravity": (8.0, 12.0)}
    words = "length 3, gravity 8 to 12 (as chosen, and for the rest the levels of its training in round 2)"
    assert str(chosen) == words
    assert choose_levels(reached, {}, "pole") is reached
    assert parse_levels(["length=1.5, gravity=9", "mass=2"]) == {"length": 1.5, "gravity": 9.0, "mass": 2.0}
    assert parse_levels(["all"]) is None


def test_episodes_are_played_at_the_levels(folder: Path):
    """With a pole of 2.1 m and gravity 8 a cart takes other steps than with one of 0.1 m and gravity 12."""
    policy = load_network(folder, "pole")
    slow, fast = ({"length": (length,) * 2, "gravity": (gravity,) * 2} for length, gravity in ((2.1, 8.0), (0.1, 12.0)))
    lengths = [policy.play(8, levels=PlayedLevels(box, "")).lengths.mean() for box in (slow, fast)]
    assert lengths[0] > lengths[1]
    whole = policy.play()
    box = {"length": (0.1, 2.1), "gravity": (8.0, 12.0)}
    assert np.array_equal(policy.play(levels=PlayedLevels(box, "")).scores, whole.scores), "as evaluations"


def test_an_evaluation_of_few_episodes_is_spread_over_all_levels_too():
    """Two episodes on four copies: the first two have the levels of two, a quarter and three quarters of the way."""
    tasks = [task for task in resolve_gym_tasks(SCENARIO) if task.client == "pole"]
    envs = make_scenario_envs(tasks, SCENARIO, None)
    envs.reset(np.arange(4))
    lengths = envs._env.env.unwrapped.parameters["length"]  # type: ignore[attr-defined]
    assert lengths.tolist() == pytest.approx([0.6, 1.6, 0.6, 1.6])
    envs.close()


def test_the_command_says_what_level_is_played_and_takes_another(folder: Path):
    shown = play(folder)
    assert "levels of pole: length 0.55 to 1.65, gravity 8 to 12 (the levels of its training in round 2)" in shown
    assert "plain" in shown
    shown = play(folder, "--client", "pole", "--level", "length=0.3,gravity=9")
    assert "levels of pole: length 0.3, gravity 9 (as chosen)" in shown
    shown = play(folder, "--client", "pole", "--level", "all")
    assert "length 0.1 to 2.1, gravity 8 to 12 (all levels of its task, as in evaluations)" in shown
    assert "levels" not in play(folder, "--client", "plain")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--level", "length=1"], "the task of client plain has no levels"),
        (["--client", "pole", "--level", "lenght=1"], "did you mean length?"),
        (["--client", "pole", "--level", "mass=1"], "its levels have length, gravity"),
        (["--client", "pole", "--level", "length"], "such as length=0.5, or all"),
        (["--client", "pole", "--level", "length=nan"], "such as length=0.5, or all"),
        (["--client", "pole", "--level", "all,length=1"], "leave the others out"),
    ],
)
def test_levels_that_do_not_fit_are_refused_with_the_cure(folder: Path, arguments: list[str], words: str):
    shown = CliRunner().invoke(app, ["play", str(folder), *arguments])
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


def test_films_show_the_middle_of_what_was_reached_and_the_page_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy, shown = tmp_path / "run", []
    shutil.copytree(folder, copy)
    original = episodes.film

    def spy(*given, **named):
        shown.append(named["level"])
        return original(*given, **named)

    monkeypatch.setattr(episodes, "film", spy)
    made = episodes.film_episodes(copy, ["pole", "plain"])
    assert not made.problems
    assert shown[:2] == [pytest.approx({"length": 1.1, "gravity": 10.0})] * 2
    assert shown[2:] == [None, None]
    page = write_page(copy).read_text()
    assert "pole, after training, at length 1.1, gravity 10: the middle of length 0.55 to 1.65" in page
    assert "plain, after training</figcaption>" in page
