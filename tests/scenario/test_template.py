"""`grpo-fed new` makes a folder whose scenario runs without any change."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium
import pytest
from typer.testing import CliRunner

from grpo_fed.cli import app
from grpo_fed.engines.start import run
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.gym import gives_pictures


def test_a_new_project_can_be_trained_without_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "My own"
    done = CliRunner().invoke(app, ["new", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"next: cd '{folder}' && grpo-fed run scenario.toml"
    monkeypatch.syspath_prepend(str(folder))
    for module in ("my_tasks", "my_policy"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    small = ["rounds=1", "steps=512", "evaluate.episodes=2"]
    result = run(Scenario.load(folder / "scenario.toml", small), workers=0)
    assert (result.scenario, result.status, len(result.clients)) == ("my-own", "finished", 6)
    assert all(client.after is not None and client.after < 0 for client in result.clients.values())
    assert result.bytes_up > 0
    assert gives_pictures("my_tasks:WindyTarget-v0")
    env = gymnasium.make("my_tasks:WindyTarget-v0", wind=0.1, render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert [int((picture == colour).all(axis=2).sum()) for colour in ([0, 140, 90], [0, 90, 180])] == [180, 180]


def test_a_folder_that_is_not_empty_stays_unchanged(tmp_path: Path):
    (tmp_path / "kept.txt").write_text("mine")
    for path, reason in ((tmp_path, "not empty"), (tmp_path / "kept.txt", "is a file")):
        done = CliRunner().invoke(app, ["new", str(path)])
        assert done.exit_code == 2
        assert reason in " ".join(done.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
