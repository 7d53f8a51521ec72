"""Commands as a user types them: exit codes, messages without tracebacks, lines that programs can read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import tomli_w
from PIL import Image
from typer.testing import CliRunner, Result

from grpo_fed import load_policy
from grpo_fed.cli import app
from grpo_fed.scenario.knobs import list_knobs
from grpo_fed.scenario.reference import knobs_markdown
from grpo_fed.scenario.shipped import find_scenario, shipped_scenarios
from tests.support.processes import find_processes_in

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "name": "tiny",
    "rounds": 2,
    "steps": 64,
    "evaluate": {"episodes": 3},
    "policy": {"hidden": [8]},
    "rollout": {"num_envs": 4, "horizon": 16},
    "objective": {"epochs": 1, "minibatches": 1},
    "clients": [{"name": "cart", "env": "grpo_fed/CartPole-v1", "count": 2}],
}
MODULE = """
import gymnasium
import torch


class Mill(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, lives=1000):
        self.lives = lives
        print("the mill turns")

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.lives -= 1
        if self.lives < 0:
            raise RuntimeError("out of coal")
        return self.observation_space.sample(), 1.0, False, False, {}


class Wide(torch.nn.Module):
    def __init__(self, sees, does):
        super().__init__()
        self.layer = torch.nn.Linear(4, 7)

    def forward(self, seen):
        return self.layer(seen), seen[:, 0]


gymnasium.register("Mill-v0", Mill)
"""


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a scenario and a user's module the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(TINY))
    (tmp_path / "their_mill.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("their_mill", None)
    gymnasium.registry.pop("Mill-v0", None)


def call(*arguments: str) -> Result:
    """Run a command in this process; it never shows a traceback."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def refusal(*arguments: str) -> str:
    """Run a wrong command, which leaves no files, and return its message."""
    before = {path.name for path in Path().iterdir()}
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == before
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def start_process(*arguments: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own that reacts to Ctrl-C."""
    # a shell starts background processes with Ctrl-C ignored, and these tests may run in one
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from grpo_fed.cli import main; main()"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=pipe, stderr=pipe, text=True)


# Without torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version", "list", "config objective", "train nope"])
def test_torch_is_only_imported_where_it_is_needed(arguments: str):
    code = f"""
import sys
from grpo_fed.cli import main
sys.argv = ["grpo-fed", *{arguments.split()!r}]
try:
    main()
finally:
    heavy = {{"torch", "numpy", "gymnasium"}} & set(sys.modules)
    if "{arguments}" in ("--help", "train --help", "--version"):
        heavy |= {{"grpo_fed.scenario.scenario", "grpo_fed.runs.folder"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if "nope" in arguments else 0), done.stderr
    assert "AssertionError" not in done.stderr


def test_ctrl_c_during_the_imports_shows_no_traceback():
    code = """
import sys
class Impatient:
    def find_spec(self, name, path=None, target=None):
        if name == "grpo_fed.cli.run":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Impatient())
from grpo_fed.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_help_names_every_command():
    done = call("--help")
    assert done.exit_code == 0
    assert all(command in done.stdout for command in ("train", "play", "check", "config", "schema", "list"))
    assert call("-h").stdout == done.stdout


# train ----------------------------------------------------------------------------------------------------------------


def test_a_run_prints_each_round_and_the_next_command():
    done = call("train", "tiny.toml", "--seed", "3", "--set", "clients.cart.count=1")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    (run,) = Path("runs").iterdir()
    assert lines[0] == "tiny: 1 client, 2 rounds of 64 steps, ppo, cpu, seed 3"
    assert lines[1] == f"{run}/"
    assert run.name.startswith("tiny-3-")
    assert lines[2].startswith("round 1/2  return ")
    assert lines[3].startswith("round 2/2  return ")
    assert f"next: grpo-fed play {run} --gif cart.gif" in done.stdout
    assert json.loads((run / "results.json").read_text())["seed"] == 3


def test_runs_of_the_same_second_have_different_folders():
    for _ in range(3):
        assert call("train", "tiny.toml", "--quiet", "--set", "rounds=1").exit_code == 0
    assert len(list(Path("runs").iterdir())) == 3


def test_quiet_prints_the_result_in_a_line():
    done = call("train", "tiny.toml", "--quiet", "--out", "here")
    result = json.loads(Path("here/results.json").read_text())
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"tiny: return {result['eval']['score_mean']:.1f} (interquartile mean ")
    assert line.endswith(", in here")
    assert done.stderr == ""


def test_json_lines_go_to_stdout_and_text_to_stderr():
    done = call("train", "tiny.toml", "--json", "--out", "here")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["type"] for line in lines] == ["round", "round", "result"]
    written = [json.loads(line) for line in Path("here/rounds.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "type"} for line in lines[:2]] == written
    result = json.loads(Path("here/results.json").read_text())
    assert lines[2] == {"type": "result", **result, "out": "here"}
    assert done.stderr.startswith("tiny: 2 clients, 2 rounds")

    quiet = call("train", "tiny.toml", "--json", "--quiet", "--out", "here", "--replace")
    (only,) = quiet.stdout.splitlines()
    assert json.loads(only)["clients"] == result["clients"]
    assert quiet.stderr == ""


def test_the_prints_of_an_environment_stay_out_of_the_json():
    done = call("train", "tiny.toml", "--json", "--set", MILL, "--set", "evaluate.step_limit=20")
    assert done.exit_code == 0, done.output
    assert all(json.loads(line) for line in done.stdout.splitlines())
    assert "the mill turns" in done.stderr


# Wrong calls and scenarios --------------------------------------------------------------------------------------------


MILL = 'clients=[{name="mill",env="their_mill:Mill-v0"}]'
OVERLAPPING = '{"torso.0"={a={"torso.0.weight:columns"=[0]},b={"torso.0.weight:rows"=[1]}}}'
WRONG = {
    "no such command": ("trian", "No such command 'trian'"),
    "no scenario": ("train", "train needs a SCENARIO, or --resume RUN"),
    "a scenario to resume": ("train tiny.toml --resume runs", "leave out SCENARIO, --set, --seed, --out and --replace"),
    "nothing to resume": ("train --resume runs", "runs: no run folder: there is no such folder"),
    "no such option": ("train tiny.toml --sede 3", "No such option"),
    "no such name": ("train cartpol", "cartpol: no scenario of this name ships; did you mean cartpole?"),
    "no such file": ("train tini.toml", "tini.toml: there is no such file; did you mean tiny.toml?"),
    "a folder": ("train .", ".: is a folder"),
    "seed": ("train tiny.toml --seed -1", "--seed"),
    "seed word": ("train tiny.toml --seed one", "--seed"),
    "set": ("train tiny.toml --set rounds", "--set rounds: must be KEY=VALUE"),
    "unknown key": ("train tiny.toml --set objective.clp=1", "did you mean clip?"),
    "penalty": ("train tiny.toml --set penalty.weight=-1", "--set penalty.weight=-1: must be 0 or more"),
    "penalty of a client": ("check tiny.toml --set clients.cart.penalty=-1", "--set clients.cart.penalty=-1: must be"),
    "task": (
        "train tiny.toml --set clients.cart.env=CratPole-v1",
        "client cart-0: env = 'CratPole-v1': no such task is registered; did you mean CartPole-v1",
    ),
    "argument": (
        "train tiny.toml --set clients.cart.kwargs={lenght=1}",
        "client cart-0: grpo_fed/CartPole-v1: cannot be made with kwargs = {'lenght': 1}",
    ),
    "module": (
        "train tiny.toml --set policy.module=their_mill:Wide",
        "client cart-0 (grpo_fed/CartPole-v1): policy.module = their_mill:Wide: for 2 observations it returns shapes",
    ),
    "module's arguments": (
        "check tiny.toml --set policy.module=their_mill:Wide --set policy.kwargs.size=3",
        "policy.module = their_mill:Wide: cannot be built with policy.kwargs = {'size': 3}: TypeError:",
    ),
    "no module of torch": (
        "check tiny.toml --set policy.module=their_mill:Mill.reset",
        "policy.module = their_mill:Mill.reset: ",
    ),
    "no module": (
        "check tiny.toml --set policy.module=their_mill:Narrow",
        "client cart-0 (grpo_fed/CartPole-v1): policy.module = their_mill:Narrow: cannot be imported",
    ),
    "overlapping blocks": (
        'check tiny.toml --set policy.blocks={a=["torso.*"],b=["torso.0"]}',
        'policy.blocks: "a" and "b" both match "torso.0.weight"; narrow one of the patterns',
    ),
    "overlapping groups": (
        f"train tiny.toml --set policy.groups={OVERLAPPING}",
        'client cart-0 (grpo_fed/CartPole-v1): policy.groups."torso.0".b: torso.0.weight[1, 0] is in the set "a" too',
    ),
    "penalised blocks": (
        'train tiny.toml --set penalty.blocks=["torsi"]',
        'client cart-0 (grpo_fed/CartPole-v1): penalty.blocks: "torsi" matches no block',
    ),
    "budgets": (
        'train tiny.toml --set trust.blocks={"torsi"=0.1}',
        'client cart-0 (grpo_fed/CartPole-v1): trust.blocks: "torsi" matches no block',
    ),
    "endless": (
        f"train tiny.toml --json --set {MILL} --set objective.preset=grpo --set group.size=2",
        'client mill: their_mill:Mill-v0 may never end an episode, and objective.advantage = "group" needs whole ones',
    ),
    "device": ("train tiny.toml --set device=cuda:7", "device = cuda:7: torch sees no"),
    "out": ("train tiny.toml --out .", ".: is not empty and holds no run"),
    "out file": ("train tiny.toml --out tiny.toml", "tiny.toml: is a file; a run needs a folder"),
    "out below file": ("train tiny.toml --out tiny.toml/run", "tiny.toml/run: cannot be made"),
    "run": ("play nowhere", "nowhere: no run folder: there is no such folder"),
    "no run": ("play .", ".: no run folder: there is no scenario.toml in it"),
    "episodes": ("play . --episodes 0", "--episodes"),
    "section": ("config objektive", "config objektive: there is no such section; did you mean objective?"),
    "all of one": ("config objective --markdown", "--markdown prints all sections: leave out objective"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_explained_and_leaves_no_files(name: str):
    line, message = WRONG[name]
    assert message in refusal(*line.split(" ")).replace("│ ", "")


def test_all_mistakes_of_a_scenario_are_reported_at_once():
    message = refusal("train", "tiny.toml", "--set", "rounds=0", "--set", "objective.clip=wide")
    assert "--set rounds=0: must be greater than 0" in message
    assert "--set objective.clip=wide: must be a number" in message


# Runs that fail or are interrupted ------------------------------------------------------------------------------------


def failing_run(*overrides: str) -> list[str]:
    """The arguments of a run whose environment fails after 60 steps."""
    clients = 'clients=[{name="mill",env="their_mill:Mill-v0",kwargs={lives=60}}]'
    return [
        "train",
        "tiny.toml",
        "--set",
        clients,
        "--set",
        "evaluate.step_limit=20",
        "--out",
        "run",
        "--replace",
        *overrides,
    ]


def test_a_failed_run_names_the_client_and_saves_the_traceback():
    done = call(*failing_run("--set", "rounds=20"))
    assert done.exit_code == 1, done.output
    assert "error: client mill: their_mill:Mill-v0: step of env copy 0 failed: RuntimeError: out of coal" in done.stderr
    assert "the traceback is in run/failure.txt" in done.stderr
    assert 'RuntimeError("out of coal")' in Path("run/failure.txt").read_text()
    result = json.loads(Path("run/results.json").read_text())
    assert result["status"] == "failed"
    assert "out of coal" in result["error"]
    assert load_policy("run").play(1).lengths == 20
    assert call(*failing_run("--set", "rounds=1")).exit_code == 0
    assert not Path("run/failure.txt").exists()


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(app, [*failing_run("--set", "rounds=20"), "--debug"])
    assert result.exit_code == 1
    assert 'raise RuntimeError("out of coal")' in result.stderr


@pytest.mark.parametrize(("number", "store"), [(signal.SIGINT, "sqlite:///mlflow.db"), (signal.SIGTERM, "off")])
def test_ctrl_c_and_sigterm_save_policies_and_results(work_folder: Path, number: signal.Signals, store: str):
    running = start_process("train", "tiny.toml", "--set", "rounds=1000000", "--out", "run", "--track", store)
    journal = work_folder / "run" / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(number)
    began = time.monotonic()
    out, err = running.communicate(timeout=60)
    assert time.monotonic() - began < 30, "it waits for something"
    assert not find_processes_in(work_folder), "what sends to MLflow has ended, too"
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted: the latest policies and results.json are in run/" in err
    assert "to continue: grpo-fed train --resume run" in err
    result = json.loads((work_folder / "run" / "results.json").read_text())
    assert result["status"] == "interrupted"
    assert result["rounds"] == len(journal.read_text().splitlines()) >= 3
    assert f"tiny: interrupted after {result['rounds']:,} rounds" in out
    assert load_policy(work_folder / "run", "cart-1").play(2).scores.shape == (2,)


# play -----------------------------------------------------------------------------------------------------------------


def test_play_prints_returns_and_makes_a_film():
    assert call("train", "tiny.toml", "--quiet", "--out", "run").exit_code == 0
    done = call("play", "run", "--client", "cart-1", "--episodes", "5", "--gif", "cart.gif")
    assert done.exit_code == 0, done.output
    scores = load_policy("run", "cart-1").play(5).scores
    row = next(line for line in done.stdout.splitlines() if "cart-1" in line).split()
    wanted = [scores.mean(), scores.std(), scores.min(), scores.max()]
    assert [float(value) for value in row[1:5]] == pytest.approx(wanted, abs=0.06)
    assert row[5] == "5"
    with Image.open("cart.gif") as gif:
        assert gif.n_frames > 3
        assert f"cart.gif: {scores[0]:.0f} steps, return {scores[0]:.1f}"[:20] in done.stdout

    both = call("play", "run", "--sampled", "--seed", "4")
    assert both.exit_code == 0
    assert all(name in both.stdout for name in ("cart-0", "cart-1"))


def test_play_refuses_wrong_arguments_before_it_plays():
    assert call("train", "tiny.toml", "--quiet", "--out", "run").exit_code == 0
    assert "no client crat-1; did you mean cart-1?" in refusal("play", "run", "--client", "crat-1")
    assert "--gif films one client: add --client NAME, one of cart-0, cart-1" in refusal(
        "play", "run", "--gif", "a.gif"
    )
    assert "a.png: must end in .gif" in refusal("play", "run", "--client", "cart-0", "--gif", "a.png")
    path = Path("run/policies/cart-0.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    assert "cart-0.safetensors: is damaged, or no policy" in refusal("play", "run", "--client", "cart-0")


# Scenarios and help ---------------------------------------------------------------------------------------------------


def test_check_shows_clients_blocks_and_sizes(work_folder: Path):
    done = call("check", "tiny.toml", "--set", 'policy.groups={"torso.0"="row"}', "--set", "penalty.weight=0.1",
                "--set", 'trust.blocks={"actor"=0.01}')  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.split()]
    rows = {line.split()[0]: line for line in reversed(lines)}  # long texts have a table of their own below
    assert rows["2"].startswith("2 clients, 2 rounds of 64 steps each: 256 steps; ppo on cpu, seed 0")
    assert rows["cart-0"].split()[:3] == ["cart-0", "to", "cart-1"]
    # 4 inputs, 8 units: weight 8x4 and bias 8, a group for each unit
    assert rows["torso.0"].split()[1:5] == ["40", "160", "B", "8"]
    assert "shared, penalised" in rows["torso.0"]
    assert rows["actor"].split()[1:5] == ["18", "72", "B", "1"]
    assert "KL <= 0.01" in done.stdout
    assert "private" in rows["critic"]
    assert "107 parameters" in done.stdout  # the actor's 40 + 18, the critic's 40 + 9
    assert not (work_folder / "runs").exists()


UNLIKE = 'clients=[{name="cart",env="grpo_fed/CartPole-v1"},{name="swing",env="grpo_fed/Pendulum-v1"}]'


def test_check_shows_only_common_blocks_as_shared():
    done = call("check", "tiny.toml", "--set", UNLIKE, "--set", 'policy.shared=["*"]', "--set", "policy.adapter=5")
    assert done.exit_code == 0, done.output
    rows = [line for line in done.stdout.splitlines() if line.split()[:1] in (["torso.0"], ["actor"], ["critic"])]
    assert ["shared" in row for row in rows] == [True, False, False] * 2
    assert done.stdout.count("shared 48, 192 B") == 2  # 5 features, 8 units: weights and biases of the torso


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (UNLIKE, "matches block torso.0"),
        ("merge.blocks.head=1", "merge.blocks"),
        ("proximity.blocks.head=1", "proximity"),
    ],
)
def test_check_refuses_what_a_run_would_refuse(override: str, why: str):
    done = call("check", "tiny.toml", "--set", override)
    assert (done.exit_code, done.stdout) == (2, "")
    assert why in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        shipped.name
        for shipped in shipped_scenarios()
        if shipped.name not in ("cheetah", "lunar", "metaworld", "reasoning", "smollm")
    ],
)
def test_every_scenario_that_ships_passes_its_check(name: str):
    done = call("check", name)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{name}: ")


def test_list_has_a_line_for_every_scenario_and_its_header_if_asked():
    lines = call("list").stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[each.name, each.description] for each in shipped_scenarios()]
    text = call("list", "--long").stdout
    for shipped in shipped_scenarios():
        assert f"\n{shipped.name}\n{shipped.header}\n\n" in f"\n{text}"
    assert find_scenario("cartpole") == ROOT / "scenarios" / "cartpole.toml"


def test_config_shows_every_knob_once():
    done = call("config")
    words = done.stdout.split()
    assert all(knob.key in words for knob in list_knobs())
    assert call("config", "group").stdout.startswith("[group]\n")
    assert call("config", "--markdown").stdout == knobs_markdown()


def test_the_schema_is_json_that_any_parser_reads():
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(call("schema").stdout, parse_constant=refuse)
    assert read["required"] == ["name", "clients"]


def test_the_version_is_that_of_the_package():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call("--version").stdout == f"grpo-fed {version}\n"


def test_an_installed_wheel_finds_its_scenarios(work_folder: Path):
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(work_folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    zipfile.ZipFile(work_folder / done.stdout.split()[-1]).extractall(work_folder / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); from grpo_fed.cli import main; sys.argv = ['grpo-fed', 'list']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=work_folder)
    assert all(shipped.name in done.stdout.split() for shipped in shipped_scenarios())
    assert (work_folder / "site" / "grpo_fed" / "_scenarios" / "cartpole.toml").is_file()
