"""Runs that go on from the end of another with changed settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from grpo_fed.cli import app
from grpo_fed.engines.alone import AloneEngine, train
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.start import run
from grpo_fed.runs.continuation import prepare_continuation
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from tests.support.small_federation import TINY

COMMON = ["evaluate.every=2", "checkpoint.keep=9", 'merge.rule="persistence"', 'proximity.mode="measured"']


def tiny(*overrides: str) -> Scenario:
    return Scenario.loads(TINY, overrides=[*COMMON, *overrides])


def go_on(source: Path, folder: Path, *overrides: str) -> Result:
    prepare_continuation(source, overrides, folder)
    with LocalEngine.resumed(folder) as engine:
        return engine.run()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "run"
    run(tiny("rounds=2"), folder, workers=0)
    return folder


def arrays(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("policies/*")) + sorted((folder / "checkpoints" / "round-0004").rglob("*.safetensors"))
    assert len(files) == 3 + 4
    return {f"{file.name}:{name}": array.tobytes() for file in files for name, array in load_file(file).items()}


def lines(folder: Path) -> list[dict[str, object]]:
    read = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in read:
        del line["time/round_s"], line["charts/SPS"]
        for client in line["clients"].values():
            client.pop("charts/seconds", None)
        line.pop("charts/seconds", None)
    return read


def test_more_rounds_are_the_bits_of_one_long_run(short: Path, tmp_path: Path):
    whole = run(tiny("rounds=4"), tmp_path / "whole", workers=0)
    result = go_on(short, tmp_path / "more", "rounds=4")
    assert arrays(tmp_path / "more") == arrays(tmp_path / "whole")
    assert lines(tmp_path / "more") == lines(tmp_path / "whole")
    assert result.clients == whole.clients
    assert (result.rounds, result.env_steps) == (4, whole.env_steps)
    assert not (short / "checkpoints" / "round-0003").exists()


def test_clients_that_learn_alone_go_on_too(tmp_path: Path):
    train(tiny("rounds=4"), tmp_path / "whole")
    train(tiny("rounds=2"), tmp_path / "short")
    prepare_continuation(tmp_path / "short", ["rounds=4"], tmp_path / "more")
    with AloneEngine.resumed(tmp_path / "more") as engine:
        engine.run()
    for file in sorted((tmp_path / "whole" / "policies").iterdir()):
        other = load_file(tmp_path / "more" / "policies" / file.name)
        assert all(np.array_equal(array, other[name]) for name, array in load_file(file).items())


def test_changed_settings_hold_from_the_first_round_that_is_added(short: Path, tmp_path: Path):
    """With a budget of 0 the shared blocks stay where the first run left them, whatever clients learn."""
    go_on(short, tmp_path / "more", "rounds=3", "proximity.kl_block=0.0", "objective.learning_rate=0.05")
    before = load_file(short / "checkpoints" / "round-0002" / "shared.safetensors")
    after = load_file(tmp_path / "more" / "checkpoints" / "round-0003" / "shared.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before if ":" not in name)
    first, *_, last = lines(tmp_path / "more")
    assert first["budget/actor"] == 0.02
    assert last["budget/actor"] == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=2"], r"rounds = 2: .* has a checkpoint after round 2; .* --set rounds=4"),
        (["rounds=4", "seed=1"], r"seed = 1: .* has 3, and a run that goes on cannot change it; .* policy\.start = "),
        (["rounds=4", "policy.hidden=[9]"], r"policy\.hidden = \[9\]: .* has \[8\]"),
        (["rounds=4", "merge.rule=mean"], r'merge\.rule = "mean": .* has "persistence"'),
        (["rounds=4", "clients.bee.kwargs={ length = 0.1 }"], r"clients\.bee\.kwargs = "),
        (["rounds=4", "clients.bee.changes=[{ round = 2, kwargs = { length = 0.1 } }]"], r"clients\.bee\.changes = "),
        (["rounds=4", "clients=[{ name = 'ant', env = 'grpo_fed/CartPole-v1' }]"], r"clients = \[\"ant\"\]"),
    ],
)
def test_what_a_checkpoint_depends_on_cannot_change(short: Path, tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        prepare_continuation(short, overrides, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_task_may_change_in_a_round_to_come(short: Path, tmp_path: Path):
    changes = "clients.bee.changes=[{ round = 3, kwargs = { length = 0.1 } }]"
    go_on(short, tmp_path / "more", "rounds=3", changes)
    assert len(lines(tmp_path / "more")) == 3


def test_a_run_that_was_ended_early_needs_another_end(tmp_path: Path):
    run(tiny("stop.target=1.0", "rounds=4"), tmp_path / "short", workers=0)
    with pytest.raises(ValueError, match=r"was ended early by \[stop\]"):
        prepare_continuation(tmp_path / "short", ["rounds=5"], tmp_path / "more")
    assert go_on(tmp_path / "short", tmp_path / "more", "rounds=3", "stop.target=1e9").rounds == 3


def test_a_run_without_a_checkpoint_names_another_way(tmp_path: Path):
    run(tiny("rounds=1", "checkpoint.every=0"), tmp_path / "short", workers=0)
    with pytest.raises(ValueError, match=r"no checkpoint to go on from; .* policy\.start"):
        prepare_continuation(tmp_path / "short", ["rounds=5"], tmp_path / "more")


def test_the_command_goes_on_into_a_new_folder(short: Path, tmp_path: Path):
    out = ["--out", str(tmp_path / "more"), "--track", "off", "--no-figures", "--quiet"]
    command = ["run", "--continue", str(short), "--set", "rounds=3", *out]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "more" / "results.json").read_text())["rounds"] == 3
    for more in (["quickstart"], ["--seed", "3"], ["--resume", str(short)], ["--engine", "flower"]):
        refused = CliRunner().invoke(app, [*command[:-5], "--out", str(tmp_path / "other"), *more])
        assert refused.exit_code != 0
        assert not (tmp_path / "other").exists()
    refused = CliRunner().invoke(app, [*command[:5], "--out", str(short), "--replace"])
    assert "is the folder of the run that goes on" in refused.output.replace("\n", " ")
