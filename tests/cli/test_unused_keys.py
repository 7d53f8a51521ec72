"""The commands name keys that have no effect: check and explain each of them, run how many there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner, Result

from grpo_fed.cli import app
from tests.cli.test_run_command import TINY

MEAN = ["--set", "merge.rule=mean"]
RUN = ["run", "tiny.toml", "--workers", "0", "--no-figures", "--out", "r"]


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a scenario the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps({**TINY, "merge": {"rule": "huber", "threshold": 0.1}}))
    return tmp_path


def call(*arguments: str) -> Result:
    """Run a command that succeeds."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result


def threshold_line(number: int) -> str:
    """The line about the threshold, which is on this line of the file."""
    reason = 'merge.rule is "mean", which compares no distance with a threshold'
    return f"tiny.toml:{number}: merge.threshold = 0.1: has no effect: {reason}"


def line_of_threshold() -> int:
    return Path("tiny.toml").read_text().splitlines().index("threshold = 0.1") + 1


def test_check_names_each_key_without_effect():
    output = call("check", "tiny.toml", *MEAN, "--set", "policy.squash=true").stdout.splitlines()
    assert output[-2:] == [
        f"note: {threshold_line(line_of_threshold())}",
        "note: --set policy.squash=true: has no effect: no client has a box of actions",
    ]


def test_explain_names_each_key_without_effect():
    output = call("explain", "tiny.toml", *MEAN).stdout.splitlines()
    assert output[-2:] == ["Keys without effect", f"  {threshold_line(line_of_threshold())}"]


@pytest.mark.parametrize("command", ["check", "explain"])
def test_nothing_is_said_where_every_key_has_an_effect(command: str):
    assert "effect" not in call(command, "tiny.toml").stdout


def test_run_gives_their_number_and_the_command_that_names_them():
    stderr = call(*RUN, *MEAN, "--set", "trust.target=0.1").stderr
    command = "grpo-fed check tiny.toml --set merge.rule=mean --set trust.target=0.1"
    assert stderr.splitlines() == [f"note: 2 keys that you set have no effect; {command} says why"]


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_programs_are_told_nothing_of_it(option: str):
    result = call(*RUN, *MEAN, option)
    assert "effect" not in result.stdout + result.stderr


def test_the_scenario_that_a_run_saves_has_no_key_to_be_named():
    call(*RUN, *MEAN, "--quiet")
    assert "effect" not in call("check", "r/scenario.toml").stdout
    assert "trust.target=0.5: has no effect" in call("check", "r/scenario.toml", "--set", "trust.target=0.5").stdout
