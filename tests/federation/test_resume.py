"""A run that was stopped and resumed has the same results as one that was not stopped."""

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
    """Resume a run of clients that learn alone."""
    with AloneEngine.resumed(folder) as engine:
        return engine.run(watch)


def scenario(*overrides: str) -> Scenario:
    return Scenario.loads(SCENARIO, overrides=overrides)


def read_outcome(folder: Path) -> dict[str, object]:
    """Read a run's results and lines without their times."""
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time/round_s"], line["charts/SPS"]
    return {"results": results, "rounds": lines}


def assert_equal_outcomes(folder: Path, other: Path) -> None:
    """Compare the results, lines and policies of two runs."""
    assert read_outcome(folder) == read_outcome(other)
    files = sorted((folder / "policies").iterdir())
    assert len(files) == 3
    for file in files:
        expected = load_file(other / "policies" / file.name)
        for name, array in load_file(file).items():
            assert np.array_equal(array, expected[name]), f"{file.name}: {name}"


@pytest.mark.parametrize("last", [1, 3])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, last: int) -> None:
    train(scenario(), tmp_path / "whole")

    def stop(record: RoundRecord) -> None:
        if record.round == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(scenario(), tmp_path / "cut", stop)
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["status"] == "interrupted"
    resume(tmp_path / "cut")
    assert_equal_outcomes(tmp_path / "whole", tmp_path / "cut")


def test_rounds_after_the_last_checkpoint_are_trained_again(tmp_path: Path) -> None:
    """A checkpoint every second round, stopped after the third: rounds 3 and 4 follow, and no line is written twice."""
    given = scenario("checkpoint.every=2", "checkpoint.keep=1")
    train(given, tmp_path / "whole")

    def stop(record: RoundRecord) -> None:
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "cut", stop)
    seen: list[int] = []
    resume(tmp_path / "cut", lambda record: seen.append(record.round))
    assert seen == [3, 4]
    assert_equal_outcomes(tmp_path / "whole", tmp_path / "cut")


def test_a_round_whose_line_was_never_written_is_told_to_the_watcher(tmp_path: Path) -> None:
    """As if the run was killed after the second round's checkpoint was written, and before its line was."""

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(scenario(), tmp_path, stop)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_text(lines[0])
    seen: list[int] = []
    resume(tmp_path, lambda record: seen.append(record.round))
    assert seen == [2, 3, 4]
    assert (tmp_path / "rounds.jsonl").read_text().startswith("".join(lines))


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """Kill the command when its first line is written, and once more later; then resume it to its end."""
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
    assert_equal_outcomes(tmp_path / "whole", tmp_path / "cut")


def count_lines(folder: Path) -> int:
    rounds = folder / "rounds.jsonl"
    return rounds.read_text().count("\n") if rounds.is_file() else 0


def test_a_finished_run_cannot_be_resumed(tmp_path: Path) -> None:
    train(scenario("rounds=1"), tmp_path)
    with pytest.raises(ValueError, match="has finished"):
        AloneEngine.resumed(tmp_path)


def test_a_run_without_checkpoints_names_the_key_that_makes_them(tmp_path: Path) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(scenario("checkpoint.every=0"), tmp_path, stop)
    with pytest.raises(ValueError, match=r"checkpoint\.every = 0"):
        resume(tmp_path)


def test_a_replaced_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    train(scenario("rounds=2"), tmp_path)
    train(scenario("rounds=1"), tmp_path, replace=True)
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]


# Federations of numeric clients --------------------------------------------------------------------------------------


SETTINGS = {
    "mean": (),
    "huber": ('merge.rule="huber"', "merge.threshold=0.4"),
    "persistence": ('merge.rule="persistence"', "merge.rejoin=2", "rounds=8"),
    "evidence": ('merge.rule="persistence"', 'merge.confirm="evidence"', "merge.rejoin=0", "rounds=6"),
    "measured": ('proximity.mode="measured"', "proximity.adaptive=true"),
    "quadratic": ('merge.rule="fisher"', 'proximity.mode="quadratic"', "proximity.adaptive=true"),
    "clusters": ('merge.rule="clusters"', 'proximity.mode="quadratic"', "proximity.kl_block=0.5", "rounds=7"),
    "adam": ('merge.optimiser="adam"', "merge.rate=0.1"),
    "momentum": (
        *('merge.rule="persistence"', "merge.rejoin=2", "rounds=8"),
        *('merge.optimiser="momentum"', 'proximity.mode="quadratic"', "proximity.kl_block=0.5"),
    ),
    "some": ("round.fraction=0.5",),
    "local": ('method="local"',),
    "early": ("stop.patience=1",),
}
CONTRARY = ("persistence", "evidence", "clusters", "momentum")
"""The settings with which a client that wants the opposite of the others parts from them."""
GAINS = {f"c-{number}": 1.0 + 0.1 * number for number in range(5)}


def federation(folder: Path, settings: str, delayed: bool, *overrides: str) -> tuple[Federation, NumericTransport]:
    """Make a federation that begins, or goes on if the folder holds a run of it; its state is only in the folder."""
    given, shared_blocks, transport = numeric_federation(
        "evaluate.every=2", "rounds=5", *SETTINGS[settings], *overrides, count=5
    )
    transport.gains = GAINS
    if settings in CONTRARY:
        goal = transport.numbers("c-0", 0) * 20
        transport.goals = dict.fromkeys(shared_blocks.clients[:-1], goal) | {shared_blocks.clients[-1]: -goal}
    after = None
    if (folder / "rounds.jsonl").is_file():
        saved, after = open_unfinished(folder)
        assert saved == given
    if after is not None:
        transport.read(after.files, after.original_names)
    states = folder.parent / f"{folder.name}-states"
    return (
        Federation(
            given, shared_blocks, transport, folder, after, delayed, lambda round: transport.write(states, round)
        ),
        transport,
    )


def read_everything(folder: Path) -> dict[str, object]:
    """Read a federation's results, lines and latest checkpoint without their times."""
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    files = [checkpoint / "shared.safetensors", *sorted((checkpoint / "clients").iterdir())]
    arrays = {f"{file.name}:{name}": array.tobytes() for file in files for name, array in load_file(file).items()}
    state = json.loads((checkpoint / "state.json").read_text())
    state["parts"]["recorder"]["totals"].pop("seconds")
    state["parts"]["server"].pop("name")
    state["parts"]["recorder"]["pending"].pop("seconds")
    return {**read_outcome(folder), "arrays": arrays, "state": state}


class StoppedError(Exception):
    """Stops a federation in the middle of a round."""


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_federation_stopped_anywhere_ends_like_a_whole_one(tmp_path: Path, settings: str, delayed: bool) -> None:
    """Stop at one message after another, so between rounds and inside them."""
    whole, transport = federation(tmp_path / "whole", settings, delayed)
    whole.run()
    has_parted = any(whole.state.departed.values()) or any(any(each) for each in whole.state.clusters.values())
    assert has_parted or settings not in CONTRARY
    messages = len(transport.sent)
    for cut in {1, messages // 5, messages // 3, messages // 2, messages - 9, messages - 2}:
        folder = tmp_path / f"cut-{cut}"
        stopped, transport = federation(folder, settings, delayed)

        def fault(name: str, instruction: Instruction, transport: NumericTransport = transport, cut: int = cut) -> None:
            if len(transport.sent) == cut:
                raise StoppedError

        transport.fault = fault
        with pytest.raises(StoppedError):
            stopped.run()
        federation(folder, settings, delayed)[0].run()
        assert read_everything(folder) == read_everything(tmp_path / "whole"), f"stopped at message {cut} of {messages}"


@pytest.mark.parametrize("delayed", [False, True])
def test_a_line_lost_after_its_checkpoint_is_written_again(tmp_path: Path, delayed: bool) -> None:
    federation(tmp_path / "whole", "measured", delayed)[0].run()

    def stop(record: RoundRecord) -> None:
        if record.round == 3:
            raise KeyboardInterrupt

    stopped, _ = federation(tmp_path / "cut", "measured", delayed)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    file = tmp_path / "cut" / "rounds.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    file.write_text("".join(lines[:2]))
    federation(tmp_path / "cut", "measured", delayed)[0].run()
    assert read_everything(tmp_path / "cut") == read_everything(tmp_path / "whole")


def test_a_resumed_federation_counts_earlier_failures_and_bytes(tmp_path: Path) -> None:
    def fault(name: str, instruction: Instruction) -> Failure | None:
        return Failure("late", "asleep") if name == "c-1" and instruction.start.round == 1 else None

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    whole, transport = federation(tmp_path / "whole", "mean", False)
    transport.fault = fault
    result = whole.run()
    stopped, transport = federation(tmp_path / "cut", "mean", False)
    transport.fault = fault
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    resumed = federation(tmp_path / "cut", "mean", False)[0].run()
    assert resumed.missing["c-1"][0] == (1, "late", "asleep")
    assert (resumed.bytes_up, resumed.bytes_down) == (result.bytes_up, result.bytes_down)
    assert resumed.clients == result.clients


def test_a_resumed_federation_keeps_its_name_and_a_new_one_has_another(tmp_path: Path) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    stopped, _ = federation(tmp_path / "cut", "mean", False)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    assert federation(tmp_path / "cut", "mean", False)[0].state.name == stopped.state.name
    assert federation(tmp_path / "new", "mean", False)[0].state.name != stopped.state.name


def test_runs_with_and_without_a_federation_cannot_resume_each_other(tmp_path: Path) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    stopped, _ = federation(tmp_path / "federation", "mean", False)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    with pytest.raises(ValueError, match=r"holds a federation; `grpo-fed run --resume` goes on with it"):
        AloneEngine.resumed(tmp_path / "federation")
    given, shared_blocks, transport = numeric_federation()
    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "alone", stop)
    given, after = open_unfinished(tmp_path / "alone")
    with pytest.raises(ValueError, match="is of a run without federation; `grpo-fed train --resume` goes on with it"):
        Federation(given, shared_blocks, transport, tmp_path / "alone", after)
