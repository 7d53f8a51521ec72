"""A run that was killed goes on to the very end that it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_fed.journal import RoundNote
from grpo_fed.scenario import Scenario
from grpo_fed.training import Training, resume, train

SCENARIO = """
name = "a"
rounds = 4
steps = 256
[policy]
hidden = [16]
[rollout]
num_envs = 4
horizon = 32
[normalise]
observations = true
[evaluate]
episodes = 4
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = 2
spread = { length = [0.2, 0.8] }
[[clients]]
name = "swing"
env = "Pendulum-v1"
"""


def scenario(*overrides: str) -> Scenario:
    return Scenario.loads(SCENARIO, overrides=overrides)


def left_behind(folder: Path) -> dict[str, object]:
    """All that a run left, but for what the clock decides."""
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time/round_s"], line["charts/SPS"]
    return {"results": results, "rounds": lines}


def assert_the_same_end(folder: Path, other: Path) -> None:
    assert left_behind(folder) == left_behind(other)
    files = sorted((folder / "policies").iterdir())
    assert len(files) == 3
    for file in files:
        theirs = load_file(other / "policies" / file.name)
        for name, array in load_file(file).items():
            assert np.array_equal(array, theirs[name]), f"{file.name}: {name}"


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path: Path, stop: int) -> None:
    train(scenario(), tmp_path / "whole")

    def stops(note: RoundNote) -> None:
        if note.round == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(scenario(), tmp_path / "cut", stops)
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["status"] == "interrupted"
    resume(tmp_path / "cut")
    assert_the_same_end(tmp_path / "whole", tmp_path / "cut")


def test_rounds_after_the_last_checkpoint_are_trained_again(tmp_path: Path) -> None:
    """A checkpoint every second round, stopped after the third: rounds 3 and 4 follow, and no line stands twice."""
    given = scenario("checkpoint.every=2", "checkpoint.keep=1")
    train(given, tmp_path / "whole")

    def stops(note: RoundNote) -> None:
        if note.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "cut", stops)
    seen: list[int] = []
    resume(tmp_path / "cut", lambda note: seen.append(note.round))
    assert seen == [3, 4]
    assert_the_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_a_run_that_is_killed_in_the_middle_of_a_round_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Kill -9 of the command, at whatever point it is when its first line is there, and again; then --resume."""
    file = tmp_path / "a.toml"
    file.write_text(SCENARIO)
    train(scenario("rounds=12"), tmp_path / "whole")
    command = [sys.executable, "-m", "grpo_fed", "train"]
    begin = [*command, str(file), "--set", "rounds=12", "--out", str(tmp_path / "cut"), "--quiet"]
    go_on = [*command, "--resume", str(tmp_path / "cut"), "--quiet"]
    killed = 0
    for arguments, lines in ((begin, 1), (go_on, 4)):
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and count_lines(tmp_path / "cut") < lines:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 1
    ended = subprocess.run(go_on, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 or "has finished" in ended.stderr, ended.stderr
    assert_the_same_end(tmp_path / "whole", tmp_path / "cut")


def count_lines(folder: Path) -> int:
    rounds = folder / "rounds.jsonl"
    return rounds.read_text().count("\n") if rounds.is_file() else 0


def test_a_finished_run_is_not_gone_on_with(tmp_path: Path) -> None:
    train(scenario("rounds=1"), tmp_path)
    with pytest.raises(ValueError, match="has finished"):
        Training.resumed(tmp_path)


def test_a_run_without_checkpoints_says_which_knob_makes_them(tmp_path: Path) -> None:
    def stops(note: RoundNote) -> None:
        if note.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(scenario("checkpoint.every=0"), tmp_path, stops)
    with pytest.raises(ValueError, match=r"checkpoint\.every = 0"):
        resume(tmp_path)


def test_a_new_run_in_an_old_folder_leaves_no_checkpoint_of_the_old_one(tmp_path: Path) -> None:
    train(scenario("rounds=2"), tmp_path)
    train(scenario("rounds=1"), tmp_path)
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]
