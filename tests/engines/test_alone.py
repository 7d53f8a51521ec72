"""A whole run: what it improves, what it leaves behind, and what is left when something stops it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from scipy.stats import trim_mean

from grpo_fed import Scenario, load_policy, train
from grpo_fed.engines.alone import AloneEngine
from grpo_fed.rl.stacked_learner import DivergedError
from grpo_fed.runs.files import append_line, write_atomic
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import iqm
from grpo_fed.tasks.task import TaskError

TINY = """
name = "tiny"
rounds = 3
steps = 128
evaluate.episodes = 3
policy.hidden = [8]
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 1
minibatches = 1
[[clients]]
name = "carts"
count = 2
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "hill"
env = "grpo_fed/MountainCarContinuous-v0"
kwargs.max_episode_steps = 50
"""
CLIENTS = ["carts-0", "carts-1", "hill"]


def tiny(*overrides: str) -> Scenario:
    return Scenario.loads(TINY, overrides=overrides)


def results(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return loaded


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_a_short_run_learns_cartpole(tmp_path: Path):
    """A policy of chance balances for some 20 steps; this one does much better after 8 rounds."""
    text = """
    name = "cart"
    rounds = 8
    steps = 2048
    rollout = { num_envs = 8, horizon = 32 }
    objective = { gamma = 0.98, gae_lambda = 0.8, learning_rate = 3e-3, epochs = 10, minibatches = 1 }
    [[clients]]
    name = "cart"
    env = "grpo_fed/CartPole-v1"
    """
    result = train(Scenario.loads(text), tmp_path)
    cart = result.clients["cart"]
    assert cart.before is not None
    assert cart.before < 60
    assert cart.after is not None
    assert cart.after > 200
    assert cart.sampled is not None
    assert cart.sampled > 100
    returns = [line["charts/episodic_return"] for line in rounds(tmp_path)]
    assert cart.best == max(returns) > 3 * returns[0]


def test_a_run_leaves_its_scenario_its_rounds_its_policies_and_its_results(tmp_path: Path):
    notes: list[RoundRecord] = []
    given = tiny("evaluate.every=2")
    result = train(given, tmp_path / "new" / "run", notes.append)
    run = tmp_path / "new" / "run"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    policies = {f"policies/{client}.safetensors" for client in CLIENTS}
    states = [f"clients/{client}.safetensors" for client in CLIENTS]
    kept = {f"checkpoints/round-000{number}/{file}" for number in (2, 3) for file in ("state.json", *states)}
    assert names == {"scenario.toml", "results.json", "rounds.jsonl", *policies, *kept}
    assert Scenario.load(run / "scenario.toml") == given
    assert [note.round for note in notes] == [0, 1, 2, 3]

    found = results(run)
    assert list(found) == [
        *("scenario", "method", "seed", "device", "status", "rounds", "seconds", "env_steps"),
        *("bytes_up", "bytes_down", "eval", "clients", "missing"),
    ]
    assert (found["scenario"], found["method"], found["seed"], found["status"]) == ("tiny", "local", 0, "finished")
    assert (found["rounds"], found["env_steps"], found["seconds"] > 0) == (3, 3 * 3 * 128, True)
    assert list(found["clients"]) == CLIENTS
    after = [client["return"] for client in found["clients"].values()]
    assert found["eval"] == {
        "score_iqm": pytest.approx(np.mean(after)),
        "score_mean": pytest.approx(np.mean(after)),
        "score_min": min(after),
    }
    for name, client in found["clients"].items():
        assert client["env_steps"] == 3 * 128
        assert client["episodes"] == sum(line["clients"][name]["charts/episodes"] for line in rounds(run))
        assert client["return_before"] == notes[0].scores[name]
        assert client["return"] == result.clients[name].after
        assert load_policy(run, name).play().score == client["return"]


def test_a_round_has_a_line_with_every_metric_of_the_whole_and_of_each_client(tmp_path: Path):
    train(tiny("evaluate.every=2"), tmp_path)
    lines = rounds(tmp_path)
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert [line["global_step"] for line in lines] == [384, 768, 1152]
    metrics = {"eval/episodic_return", "charts/episodic_return", "charts/episodic_length", "charts/episodes"}
    losses = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
    metrics |= {f"losses/{name}" for name in losses}
    for line in lines:
        assert list(line["clients"]) == CLIENTS
        assert metrics | {"eval/score_iqm", "eval/score_min", "charts/SPS", "time/round_s"} <= set(line)
        assert line["charts/SPS"] == pytest.approx(384 / line["time/round_s"], rel=0.05)
        for client in line["clients"].values():
            assert metrics <= set(client)
        entropies = [client["losses/entropy"] for client in line["clients"].values()]
        assert line["losses/entropy"] == pytest.approx(np.mean(entropies))
        scores = [client["eval/episodic_return"] for client in line["clients"].values()]
        if line["round"] == 1:
            assert scores == [None] * 3
            assert line["eval/score_min"] is None
        else:
            assert line["eval/episodic_return"] == pytest.approx(np.mean(scores))
            assert line["eval/score_min"] == min(scores)


def test_the_same_seed_gives_the_same_results_and_another_one_does_not(tmp_path: Path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        train(tiny(f"seed={seed}"), tmp_path / str(number))
        found.append({key: value for key, value in results(tmp_path / str(number)).items() if key != "seconds"})
    first, second = (tmp_path / str(number) / "policies" for number in (0, 1))
    assert found[0] == found[1] != found[2]
    for client in CLIENTS:
        name = f"{client}.safetensors"
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert train(tiny("rounds=1")).out is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 13])
def test_the_interquartile_mean_is_scipys_trimmed_mean(count: int):
    scores = np.random.default_rng(count).normal(size=count)
    assert iqm(scores) == pytest.approx(trim_mean(scores, 0.25))


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_run_takes_the_place_of_an_older_one_and_of_nothing_else(tmp_path: Path):
    train(tiny("rounds=1"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    train(tiny("rounds=2", "clients.carts.count=1"), tmp_path)
    assert len(rounds(tmp_path)) == 2
    assert {path.name for path in (tmp_path / "policies").iterdir()} == {"carts.safetensors", "hill.safetensors"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "scenario.toml").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run; name another folder"):
        train(tiny(), tmp_path)
    with pytest.raises(ValueError, match="is a file; a run needs a folder"):
        train(tiny(), tmp_path / "scenario.toml")
    with pytest.raises(ValueError, match=r"cannot be made, for .*scenario\.toml is a file"):
        train(tiny(), tmp_path / "scenario.toml" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["scenario.toml"]
    assert (tmp_path / "scenario.toml").read_text() == "mine"


def test_what_is_wrong_with_the_scenario_is_found_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match=r"policy\.groups: "):
        train(tiny('policy.groups={ "nowhere" = "row" }'), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    write_atomic(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a.json", "new \udc80")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(tmp_path / "folder", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    write_atomic(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder"]


def test_a_line_that_the_disk_has_no_room_for_is_not_begun(tmp_path: Path):
    path = tmp_path / "rounds.jsonl"
    append_line(path, "12345")
    code = f"""
import resource
from pathlib import Path
from grpo_fed.runs.files import add_line, write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
for write in (add_line, write_whole):
    try:
        write(Path({str(path)!r}), "a line that is too long")
    except OSError as error:
        assert error.filename == {str(path)!r}
        print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["No space left on device", "File too large"]
    assert path.read_text() == "12345\n"
    assert list(tmp_path.iterdir()) == [path]


# What stops a run -----------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_policies_as_they_are_and_says_so_in_the_results(tmp_path: Path):
    def stop(note: RoundRecord) -> None:
        if note.round == 2:
            raise KeyboardInterrupt

    with AloneEngine(tiny(), tmp_path) as training, pytest.raises(KeyboardInterrupt):
        training.run(stop)
    found = results(tmp_path)
    assert (found["status"], found["error"], found["rounds"]) == ("interrupted", "KeyboardInterrupt", 2)
    assert len(rounds(tmp_path)) == 2
    assert found["env_steps"] == 2 * 384
    assert found["eval"] == {"score_iqm": None, "score_mean": None, "score_min": None}
    for number, client in enumerate(CLIENTS):
        fleet = training.learners[0 if client.startswith("carts") else 1]
        saved = load_policy(tmp_path, client)
        assert (saved.parameters == fleet.parameters[number if len(fleet.names) > 1 else 0]).all()
        assert found["clients"][client]["return_before"] is not None
        assert found["clients"][client]["return"] is None


def test_a_policy_that_diverges_stops_the_run_and_names_the_client(tmp_path: Path):
    overrides = ["clients.carts.count=1", "clients.carts.learning_rate=1e20", "objective.max_grad_norm=inf"]
    with pytest.raises(
        DivergedError,
        match=r"client carts: its policy is no longer finite after update 2; lower its",
    ):
        train(tiny(*overrides), tmp_path)
    found = results(tmp_path)
    assert found["status"] == "failed"
    assert found["error"].startswith("Diverged: client carts: ")
    assert len(rounds(tmp_path)) == found["rounds"]
    assert {path.name for path in (tmp_path / "policies").iterdir()} == {"hill.safetensors"}


class Broken(gymnasium.Env[Any, Any]):
    """Does something that it should not, after so many of its steps."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, fault: str, after: int = 0) -> None:
        self.fault, self.after, self.steps = fault, after, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        seen, reward, over = np.zeros(2, np.float32), 1.0, self.steps % 10 == 0
        if self.steps > self.after:
            match self.fault:
                case "raises":
                    raise RuntimeError("out of coal")
                case "nan reward":
                    reward = math.nan
                case "nan observation":
                    seen[1] = math.nan
                case "shape":
                    seen = np.zeros(3, np.float32)
                case "endless":
                    over = False
        return seen, reward, over, False, {}


@pytest.fixture
def broken():
    gymnasium.register("test/Broken-v0", Broken)
    yield
    del gymnasium.registry["test/Broken-v0"]


def with_broken(fault: str, after: int, *overrides: str) -> Scenario:
    text = (
        f'{TINY}[[clients]]\nname = "mill"\nenv = "test/Broken-v0"\nkwargs = {{ fault = "{fault}", after = {after} }}\n'
    )
    return Scenario.loads(text, overrides=overrides)


FAULTS = {
    "raises": (TaskError, "client mill: test/Broken-v0: step of lane 0 failed: RuntimeError: out of coal"),
    "nan reward": (ValueError, "client mill: .* reward is nan; mend the environment"),
    "nan observation": (ValueError, "client mill: .*entry 1 of the observation is nan; mend the environment"),
    "shape": (TaskError, r"client mill: test/Broken-v0: .*an observation has shape \(3,\); its space says \(2,\)"),
}


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("fault", FAULTS)
def test_an_environment_that_breaks_while_it_is_learned_is_named(tmp_path: Path, fault: str):
    kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        train(with_broken(fault, 40), tmp_path)
    found = results(tmp_path)
    assert (found["status"], found["rounds"]) == ("failed", 1)
    assert "client mill: " in found["error"]
    assert len(list((tmp_path / "policies").iterdir())) == 4


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("fault", ["nan reward", "nan observation"])
def test_what_is_not_finite_in_an_evaluation_is_found_too(tmp_path: Path, fault: str):
    with pytest.raises(ValueError, match=f"client mill: at step 2 of an evaluation episode, the {fault[4:]} is not"):
        train(with_broken(fault, 2), tmp_path)
    assert results(tmp_path)["rounds"] == 0


@pytest.mark.usefixtures("broken")
def test_an_episode_that_never_ends_is_cut_in_an_evaluation_and_refused_where_whole_ones_are_needed():
    result = train(with_broken("endless", 0, "evaluate.step_limit=20", "rounds=1"))
    assert result.clients["mill"].after == 20.0
    assert result.clients["mill"].episodes == 0
    assert result.clients["mill"].best is None
    with pytest.raises(ValueError, match=r"client mill: .*never end an episode.*set rollout\.episode_limit"):
        train(with_broken("endless", 0, "objective.preset=grpo", "group.size=2"))
