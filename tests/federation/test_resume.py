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

from grpo_fed.engines.alone import AloneEngine, train
from grpo_fed.federation.messages import Instruction
from grpo_fed.federation.rounds import Federation
from grpo_fed.runs.folder import open_unfinished
from grpo_fed.runs.recorder import Watch
from grpo_fed.runs.records import Failure, RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from tests.support.numeric_clients import NumericTransport, numeric_federation

SCENARIO = """
name = "a"
rounds = 4
steps = 256
[policy]
hidden = [16]
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 2
minibatches = 4
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


def resume(folder: Path, watch: Watch = lambda record: None) -> Result:
    """Go on with clients that learn alone."""
    with AloneEngine.resumed(folder) as engine:
        return engine.run(watch)


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

    def stops(note: RoundRecord) -> None:
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

    def stops(note: RoundRecord) -> None:
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
        AloneEngine.resumed(tmp_path)


def test_a_run_without_checkpoints_says_which_knob_makes_them(tmp_path: Path) -> None:
    def stops(note: RoundRecord) -> None:
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


# Federations, of clients that are numbers alone -----------------------------------------------------------------------


SETTINGS = {
    "mean": (),
    "huber": ('merge.rule="huber"', "merge.threshold=0.4"),
    "persistence": ('merge.rule="persistence"', "rounds=8"),
    "measured": ('proximity.mode="measured"', "proximity.adaptive=true"),
    "quadratic": ('merge.rule="fisher"', 'proximity.mode="quadratic"', "proximity.adaptive=true"),
    "clusters": ('merge.rule="clusters"', "merge.structure=-1.0", 'proximity.mode="quadratic"'),
    "some": ("round.fraction=0.5",),
    "local": ('method="local"',),
    "early": ("stop.patience=1",),
}
GAINS = {f"c-{number}": 1.0 + 0.1 * number for number in range(5)}


def federation(folder: Path, settings: str, fold: bool, *overrides: str) -> tuple[Federation, NumericTransport]:
    """One that begins, or one that goes on, in a process that knows nothing but what the folder holds."""
    given, commons, post = numeric_federation(*SETTINGS[settings], "evaluate.every=2", "rounds=5", *overrides, count=5)
    post.gains = GAINS
    after = None
    if (folder / "rounds.jsonl").is_file():
        found, after = open_unfinished(folder)
        assert found == given
    if after is not None:
        post.read(after.files, after.original_names)
    home = folder.parent / f"{folder.name}-home"
    return Federation(given, commons, post, folder, after, fold, lambda number: post.write(home, number)), post


def everything(folder: Path) -> dict[str, object]:
    """All that a federation left that the clock does not decide, parameters and all."""
    found = left_behind(folder)
    place = sorted((folder / "checkpoints").iterdir())[-1]
    files = [place / "shared.safetensors", *sorted((place / "clients").iterdir())]
    arrays = {f"{file.name}:{name}": array.tobytes() for file in files for name, array in load_file(file).items()}
    state = json.loads((place / "state.json").read_text())
    state["parts"]["recorder"]["totals"].pop("seconds")
    state["parts"]["server"].pop("name")
    state["parts"]["recorder"]["pending"].pop("seconds")
    return {**found, "arrays": arrays, "state": state}


class Cut(Exception):
    """The power."""


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_federation_ends_as_it_would_have_wherever_it_is_cut_off(tmp_path: Path, settings: str, fold: bool) -> None:
    """At a message to one of the clients, a different one each time; so between rounds and inside them."""
    whole, post = federation(tmp_path / "whole", settings, fold)
    whole.run()
    messages = len(post.sent)
    for cut in {1, messages // 5, messages // 3, messages // 2, messages - 9, messages - 2}:
        folder = tmp_path / f"cut-{cut}"
        going, post = federation(folder, settings, fold)

        def fault(name: str, told: Instruction, post: NumericTransport = post, cut: int = cut) -> None:
            if len(post.sent) == cut:
                raise Cut

        post.fault = fault
        with pytest.raises(Cut):
            going.run()
        federation(folder, settings, fold)[0].run()
        assert everything(folder) == everything(tmp_path / "whole"), f"cut off at message {cut} of {messages}"


@pytest.mark.parametrize("fold", [False, True])
def test_a_line_that_was_cut_off_after_its_checkpoint_is_written_again(tmp_path: Path, fold: bool) -> None:
    federation(tmp_path / "whole", "measured", fold)[0].run()

    def stop(note: RoundRecord) -> None:
        if note.round == 3:
            raise KeyboardInterrupt

    going, _ = federation(tmp_path / "cut", "measured", fold)
    with pytest.raises(KeyboardInterrupt):
        going.run(stop)
    file = tmp_path / "cut" / "rounds.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    file.write_text("".join(lines[:2]))
    federation(tmp_path / "cut", "measured", fold)[0].run()
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")


def test_a_federation_that_went_on_remembers_who_was_missing_and_what_was_sent(tmp_path: Path) -> None:
    def fault(name: str, told: Instruction) -> Failure | None:
        return Failure("late", "asleep") if name == "c-1" and told.start.round == 1 else None

    def stop(note: RoundRecord) -> None:
        if note.round == 2:
            raise KeyboardInterrupt

    whole, post = federation(tmp_path / "whole", "mean", False)
    post.fault = fault
    result = whole.run()
    going, post = federation(tmp_path / "cut", "mean", False)
    post.fault = fault
    with pytest.raises(KeyboardInterrupt):
        going.run(stop)
    resumed = federation(tmp_path / "cut", "mean", False)[0].run()
    assert resumed.missing["c-1"][0] == (1, "late", "asleep")
    assert (resumed.bytes_up, resumed.bytes_down) == (result.bytes_up, result.bytes_down)
    assert resumed.clients == result.clients


def test_clients_know_a_federation_that_goes_on_by_its_name_and_a_new_one_by_another(tmp_path: Path) -> None:
    def stop(note: RoundRecord) -> None:
        if note.round == 1:
            raise KeyboardInterrupt

    going, _ = federation(tmp_path / "cut", "mean", False)
    with pytest.raises(KeyboardInterrupt):
        going.run(stop)
    assert federation(tmp_path / "cut", "mean", False)[0].state.name == going.state.name
    assert federation(tmp_path / "new", "mean", False)[0].state.name != going.state.name


def test_a_federation_and_a_run_without_one_do_not_go_on_with_each_other(tmp_path: Path) -> None:
    def stop(note: RoundRecord) -> None:
        if note.round == 1:
            raise KeyboardInterrupt

    going, _ = federation(tmp_path / "federation", "mean", False)
    with pytest.raises(KeyboardInterrupt):
        going.run(stop)
    with pytest.raises(ValueError, match=r"holds a federation; `grpo-fed run --resume` goes on with it"):
        AloneEngine.resumed(tmp_path / "federation")
    given, commons, post = numeric_federation()
    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "alone", stop)
    given, after = open_unfinished(tmp_path / "alone")
    with pytest.raises(ValueError, match="is of a run without federation; `grpo-fed train --resume` goes on with it"):
        Federation(given, commons, post, tmp_path / "alone", after)
