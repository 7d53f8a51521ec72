"""The commands run, compare and report, with the local engine in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import grpo_fed
from grpo_fed import Scenario, load_policy
from grpo_fed.cli import app
from grpo_fed.engines.local.engine import LocalEngine

TINY = {
    "name": "tiny",
    "rounds": 2,
    "steps": 64,
    "evaluate": {"episodes": 3},
    "policy": {"hidden": [8]},
    "rollout": {"num_envs": 4, "horizon": 16},
    "objective": {"epochs": 1, "minibatches": 1},
    "merge": {"rule": "huber", "threshold": 0.0},
    "clients": [{"name": "cart", "env": "grpo_fed/CartPole-v1", "count": 2}],
}


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a scenario the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(TINY))
    return tmp_path


def call(*arguments: str) -> Result:
    """Run a command in this process; it never shows a traceback."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def run(*arguments: str) -> Result:
    """Run the scenario, which succeeds."""
    result = call("run", "tiny.toml", "--workers", "0", *arguments)
    assert result.exit_code == 0, result.output
    return result


def test_a_run_leaves_all_of_its_files_in_a_folder():
    output = run("--out", "r").stdout
    assert "tiny: 2 clients, 2 rounds of 64 steps, grpo, ppo" in output
    assert "round 2/2" in output
    assert "grpo-fed report r" in output
    folder = Path("r")
    results = json.loads((folder / "results.json").read_text())
    assert (results["method"], results["status"], results["rounds"]) == ("grpo", "finished", 2)
    assert results["bytes_up"] > 0
    assert results["clients"]["cart-0"]["personal_groups"] == [
        "torso.0",
        "actor",
    ]  # threshold 0: all depart
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2
    assert Scenario.load(folder / "scenario.toml").method == "grpo"
    assert (folder / "figures" / "learning.png").is_file()
    assert "films: r/episodes/, the worst and the best client before and after training" in output
    assert {path.stem.rpartition("-")[2] for path in (folder / "episodes").iterdir()} == {"before", "after"}
    assert "cart-1" in (folder / "summary.md").read_text()
    assert {path.name for path in (folder / "checkpoints" / "round-0002").iterdir()} == {
        "SHA256SUMS",
        "clients",
        "shared.safetensors",
        "state.json",
    }
    assert load_policy(folder, "cart-1").play(episodes=2).scores.shape == (2,)


def test_films_can_be_left_out():
    output = run("--out", "r", "--no-films").stdout
    assert "figures: r/figures/" in output
    assert "films" not in output
    assert not Path("r/episodes").exists()


def test_a_run_may_have_an_environment_that_cannot_be_drawn(work_folder: Path, monkeypatch: pytest.MonkeyPatch):
    (work_folder / "unseen.py").write_text(
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "import gymnasium\n"
        "class Unseen(CartPoleEnv):\n"
        "    def render(self):\n"
        "        raise RuntimeError('no lamp')\n"
        "gymnasium.register('Unseen-v0', Unseen, max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(str(work_folder))
    result = run("--out", "r", "--set", "clients.cart.env=unseen:Unseen-v0")
    assert "films" not in result.output
    assert not list(Path("r/episodes").iterdir())


def test_a_method_is_chosen_by_name():
    run("--out", "r", "--no-figures", "--quiet", "--set", "method=fedavg")
    results = json.loads(Path("r/results.json").read_text())
    assert results["method"] == "fedavg"
    assert results["clients"]["cart-0"]["personal_groups"] == []
    assert not Path("r/figures").exists()


def test_json_has_the_metrics_of_the_server():
    result = run("--out", "r", "--no-figures", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["type"] for line in lines] == ["round", "round", "result"]
    assert lines[0]["fed/clients_ok"] == 2
    assert {"kl/actor", "alpha/actor", "comm/MB_up", "comm/MB_down"} <= lines[0].keys()
    assert "tiny: 2 clients" in result.stderr


def test_the_local_method_gives_the_results_of_train():
    run("--out", "r", "--no-figures", "--set", "method=local")
    assert call("train", "tiny.toml", "--out", "t", "--no-figures", "--set", "method=local").exit_code == 0
    ours, theirs = (json.loads(Path(folder, "results.json").read_text())["clients"] for folder in ("r", "t"))
    for name in ("cart-0", "cart-1"):
        assert ours[name]["return_best"] == theirs[name]["return_best"]
        federated, alone = (load_file(Path(folder, "policies", f"{name}.safetensors")) for folder in ("r", "t"))
        assert federated.keys() == alone.keys()
        for key in federated:
            torch.testing.assert_close(federated[key], alone[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("tiny.toml", "--superlink", "x"),
            "superlink = x: only the engine flower has a SuperLink; this engine is local",
        ),
        (("tiny.toml", "--engine", "flower", "--workers", "2"), "only the local engine has workers"),
        (("--resume", "r", "--workers", "2"), "leave out --workers"),
        (("tiny.toml", "--resume", "r"), "leave out SCENARIO"),
        ((), "run needs a SCENARIO"),
        (("tiny.toml", "--track", "nonsense"), "is no store for runs"),
        (("tiny.toml", "--set", "policy.shared=['actr']"), 'did you mean "actor"?'),
        (("tiny.toml", "--set", "merge.blocks={critic=0.1}"), "critic"),
        (("tiny.toml", "--engine", "flower", "--superlink", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_written(arguments: tuple[str, ...], message: str):
    result = call("run", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert {path.name for path in Path().iterdir()} <= {"tiny.toml"}


def test_a_comparison_is_continued_with_more_seeds():
    arguments = ("compare", "tiny.toml", "--methods", "local,fedavg", "--workers", "0", "--out", "c")
    first = call(*arguments, "--seeds", "1")
    assert first.exit_code == 0, first.output
    assert "one seed cannot tell" in first.stdout
    again = call(*arguments, "--seeds", "2")
    assert again.exit_code == 0, again.output
    document = json.loads(Path("c/comparison.json").read_text())
    assert document["seeds"] == [0, 1]
    assert set(document["methods"]) == {"local", "fedavg"}
    assert call(*arguments[:2], "--methods", "local,fedavvg").exit_code == 2


def test_a_report_is_one_page_without_links():
    run("--out", "r", "--no-figures")
    result = call("report", "r", "--no-episodes")
    assert result.exit_code == 0, result.output
    page = Path("r/report.html").read_text()
    assert "cart-1" in page
    assert not re.search(r"(src|href)=.https?:", page)
    assert call("report", "nowhere").exit_code == 2


def test_a_run_from_python_is_the_run_of_the_command(work_folder: Path):
    seen = []
    result = grpo_fed.run(Scenario.load("tiny.toml"), out=work_folder / "r", watch=seen.append, workers=0)
    assert [record.round for record in seen] == [0, 1, 2]
    assert result.status == "finished"
    with pytest.raises(ValueError, match="has finished"):
        grpo_fed.resume(work_folder / "r")
    with pytest.raises(ValueError, match="only the local engine"):
        grpo_fed.run(Scenario.load("tiny.toml"), engine="flower-sim", workers=1)


def test_a_run_without_a_checkpoint_resumes_with_its_workers(work_folder: Path):
    def stop(record: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grpo_fed.run(Scenario.load("tiny.toml"), out=work_folder / "r", watch=stop, workers=0)
    with LocalEngine.resumed(work_folder / "r") as federation:
        assert federation.schedule.workers == 0
        assert federation.run().status == "finished"


def run_with_early_reader(*arguments: str, lines: int = 1) -> tuple[int, str]:
    """Run with a reader of stdout that leaves after some lines; return exit code and stderr."""
    command = [sys.executable, "-m", "grpo_fed", "run", "tiny.toml", "--workers", "0", "--track", "off", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        return process.wait(60), errors


def test_a_run_goes_on_after_its_reader_has_left():
    code, errors = run_with_early_reader("--out", "r", "--no-figures")
    assert code == 1
    assert errors == ("note: stdout could not be written: broken pipe; the run went on, and its results are in r/\n")
    assert json.loads(Path("r/results.json").read_text())["status"] == "finished"


def test_a_run_needs_no_stdout():
    command = f"exec {sys.executable} -m grpo_fed run tiny.toml --workers 0 --track off --no-figures --out r >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(Path("r/results.json").read_text())["status"] == "finished"


def test_ctrl_c_while_figures_are_drawn_leaves_a_finished_run(monkeypatch: pytest.MonkeyPatch):
    def impatient(folder: Path, only: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grpo_fed.reports.figures.write.draw_figures", impatient)
    done = call("run", "tiny.toml", "--workers", "0", "--track", "off", "--out", "r")
    assert done.exit_code == 130
    assert "the run has finished; grpo-fed report r draws its figures" in done.stderr
    assert json.loads(Path("r/results.json").read_text())["status"] == "finished"
