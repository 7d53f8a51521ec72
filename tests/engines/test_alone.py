"""Training without a federation: what it learns, the files that it writes, and the files after a failure."""

from __future__ import annotations

import json
import math
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
from grpo_fed.runs.folder import FolderTakenError
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.statistics import iqm
from grpo_fed.tasks.scores import scales_of
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
    """Make a scenario of three clients that trains in a second."""
    return Scenario.loads(TINY, overrides=overrides)


def read_results(folder: Path) -> dict[str, Any]:
    """Read results.json."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """Read rounds.jsonl."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_a_short_run_learns_cartpole(tmp_path: Path):
    """A random policy balances the pole for some 20 steps; after twelve rounds most clients reach the limit of 500.

    Rounding differs between processors, and one client's return with it. So the bounds are on the median and the least
    of five clients with random streams of their own. Over the seeds 0 to 9 the lowest median after training is 443, the
    lowest return of any client 152, and the best round has at least 8 times the return of the first.
    """
    text = """
    name = "cart"
    rounds = 12
    steps = 2048
    rollout = { num_envs = 8, horizon = 128 }
    objective = { gamma = 0.98, gae_lambda = 0.8, learning_rate = 2e-3, epochs = 10, minibatches = 4 }
    [[clients]]
    name = "cart"
    count = 5
    env = "grpo_fed/CartPole-v1"
    """
    carts = train(Scenario.loads(text), tmp_path).clients
    before, after, sampled = (
        np.array([getattr(cart, name) for cart in carts.values()], np.float64)
        for name in ("before", "after", "sampled")
    )
    assert before.max() < 60
    assert np.median(after) > 300
    assert after.min() > 60
    assert np.median(sampled) > 200
    assert sampled.min() > 60
    lines = read_rounds(tmp_path)
    for name, cart in carts.items():
        trained = [line["clients"][name]["charts/episodic_return"] for line in lines]
        assert cart.best == max(trained) > 3 * trained[0]


def test_a_run_leaves_scenario_rounds_policies_and_results(tmp_path: Path):
    records: list[RoundRecord] = []
    given = tiny("evaluate.every=2")
    result = train(given, tmp_path / "new" / "run", records.append)
    run = tmp_path / "new" / "run"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    policies = {f"policies/{client}.safetensors" for client in CLIENTS}
    states = [f"clients/{client}.safetensors" for client in CLIENTS]
    checkpoints = {
        f"checkpoints/round-000{number}/{file}" for number in (2, 3) for file in ("state.json", "SHA256SUMS", *states)
    }
    assert names == {"scenario.toml", "results.json", "rounds.jsonl", *policies, *checkpoints}
    assert Scenario.load(run / "scenario.toml") == given
    assert [record.round for record in records] == [0, 1, 2, 3]

    saved = read_results(run)
    assert list(saved) == [
        *("scenario", "method", "seed", "device", "status", "rounds", "seconds", "env_steps"),
        *("bytes_up", "bytes_down", "comparison_episodes", "eval", "clients", "missing"),
    ]
    assert (saved["scenario"], saved["method"], saved["seed"], saved["status"]) == ("tiny", "local", 0, "finished")
    assert (saved["rounds"], saved["env_steps"], saved["seconds"] > 0) == (3, 3 * 3 * 128, True)
    assert list(saved["clients"]) == CLIENTS
    after = [client["return"] for client in saved["clients"].values()]
    assert [saved["eval"][f"score_{key}"] for key in ("iqm", "mean", "min")] == [None] * 3  # environments are unlike
    scales = [scales_of(given)["carts" if name.startswith("carts") else name] for name in CLIENTS]
    scores = [scale.normalise(value) for scale, value in zip(scales, after, strict=True)]
    assert saved["eval"]["normalised_mean"] == saved["eval"]["normalised_iqm"] == pytest.approx(np.mean(scores))
    assert saved["eval"]["normalised_min"] == min(scores)
    assert saved["eval"]["by_environment"][scales[0].label]["min"] == min(after[:2])
    for name, client in saved["clients"].items():
        assert client["env_steps"] == 3 * 128
        assert client["episodes"] == sum(line["clients"][name]["charts/episodes"] for line in read_rounds(run))
        assert client["return_before"] == records[0].scores[name]
        assert client["return"] == result.clients[name].after
        assert load_policy(run, name).play().score == client["return"]


def test_a_line_has_every_metric_of_the_run_and_each_client(tmp_path: Path):
    train(tiny("evaluate.every=2"), tmp_path)
    lines = read_rounds(tmp_path)
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert [line["global_step"] for line in lines] == [384, 768, 1152]
    metrics = {"eval/episodic_return", "charts/episodic_return", "charts/episodic_length", "charts/episodes"}
    losses = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
    metrics |= {f"losses/{name}" for name in losses}
    of_whole = {key for key in metrics if not key.endswith("_return")} | {"charts/normalised_return"}
    for line in lines:
        assert list(line["clients"]) == CLIENTS
        assert of_whole | {"eval/score_iqm", "eval/score_min", "charts/SPS", "time/round_s"} <= set(line)
        assert line["charts/SPS"] == pytest.approx(384 / line["time/round_s"], rel=0.05)
        for client in line["clients"].values():
            assert metrics <= set(client)
        entropies = [client["losses/entropy"] for client in line["clients"].values()]
        assert line["losses/entropy"] == pytest.approx(np.mean(entropies))
        scores = [client["eval/episodic_return"] for client in line["clients"].values()]
        if line["round"] == 1:
            assert scores == [None] * 3
            assert "eval/normalised_min" not in line
        else:
            scales = [scales_of(tiny())[entry] for entry in (*["carts"] * 2, CLIENTS[2])]
            normalised = [scale.normalise(score) for scale, score in zip(scales, scores, strict=True)]
            assert line["eval/normalised_min"] == min(normalised)
            of_carts = line[f"env/{scales[0].label}/eval/episodic_return"]
            assert of_carts == pytest.approx(np.mean(scores[:2]))
        assert (line["eval/score_min"], "eval/episodic_return" in line) == (None, False)  # environments are unlike


def test_results_are_equal_for_equal_seeds_alone(tmp_path: Path):
    saved = []
    for number, seed in enumerate((0, 0, 1)):
        train(tiny(f"seed={seed}"), tmp_path / str(number))
        saved.append({key: value for key, value in read_results(tmp_path / str(number)).items() if key != "seconds"})
    first, second = (tmp_path / str(number) / "policies" for number in (0, 1))
    assert saved[0] == saved[1] != saved[2]
    for client in CLIENTS:
        name = f"{client}.safetensors"
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_run_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert train(tiny("rounds=1")).out is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 13])
def test_the_interquartile_mean_is_scipys_trimmed_mean(count: int):
    scores = np.random.default_rng(count).normal(size=count)
    assert iqm(scores) == pytest.approx(trim_mean(scores, 0.25))


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_run_is_replaced_on_demand_alone(tmp_path: Path):
    train(tiny("rounds=1"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FolderTakenError, match="holds a run; name another folder"):
        train(tiny("rounds=2"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    train(tiny("rounds=2", "clients.carts.count=1"), tmp_path, replace=True)
    assert len(read_rounds(tmp_path)) == 2
    assert {path.name for path in (tmp_path / "policies").iterdir()} == {"carts.safetensors", "hill.safetensors"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for replace in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no run; name another folder"):
            train(tiny(), tmp_path, replace=replace)
    with pytest.raises(ValueError, match="is a file; a run needs a folder"):
        train(tiny(), tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"cannot be made, for .*notes\.txt is a file"):
        train(tiny(), tmp_path / "notes.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_invalid_scenario_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match=r"policy\.groups: "):
        train(tiny('policy.groups={ "nowhere" = "row" }'), tmp_path / "run")
    assert not list(tmp_path.iterdir())


# Interrupted and failed runs ------------------------------------------------------------------------------------------


def test_an_interrupted_run_saves_its_policies_and_its_status(tmp_path: Path):
    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with AloneEngine(tiny(), tmp_path) as engine, pytest.raises(KeyboardInterrupt):
        engine.run(stop)
    saved = read_results(tmp_path)
    assert (saved["status"], saved["error"], saved["rounds"]) == ("interrupted", "KeyboardInterrupt", 2)
    assert len(read_rounds(tmp_path)) == 2
    assert saved["env_steps"] == 2 * 384
    assert not any(saved["eval"].values())
    for number, client in enumerate(CLIENTS):
        learner = engine.learners[0 if client.startswith("carts") else 1]
        policy = load_policy(tmp_path, client)
        assert (policy.parameters == learner.parameters[number if len(learner.names) > 1 else 0]).all()
        assert saved["clients"][client]["return_before"] is not None
        assert saved["clients"][client]["return"] is None


def test_a_diverged_policy_stops_the_run_and_is_named(tmp_path: Path):
    overrides = ["clients.carts.count=1", "clients.carts.learning_rate=1e20", "objective.max_grad_norm=inf"]
    with pytest.raises(
        DivergedError,
        match=r"client carts: its policy is no longer finite after update 2; lower its",
    ):
        train(tiny(*overrides), tmp_path)
    saved = read_results(tmp_path)
    assert saved["status"] == "failed"
    assert saved["error"].startswith("DivergedError: client carts: ")
    assert len(read_rounds(tmp_path)) == saved["rounds"]
    assert {path.name for path in (tmp_path / "policies").iterdir()} == {"hill.safetensors"}


class Broken(gymnasium.Env[Any, Any]):
    """Fails after so many steps, in the manner of `fault`."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, fault: str, after: int = 0) -> None:
        self.fault, self.after, self.steps = fault, after, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation, reward, terminated = np.zeros(2, np.float32), 1.0, self.steps % 10 == 0
        if self.steps > self.after:
            match self.fault:
                case "raises":
                    raise RuntimeError("out of coal")
                case "nan reward":
                    reward = math.nan
                case "nan observation":
                    observation[1] = math.nan
                case "shape":
                    observation = np.zeros(3, np.float32)
                case "endless":
                    terminated = False
        return observation, reward, terminated, False, {}


@pytest.fixture
def broken():
    gymnasium.register("test/Broken-v0", Broken)
    yield
    del gymnasium.registry["test/Broken-v0"]


def with_broken(fault: str, after: int, *overrides: str) -> Scenario:
    """Add a client whose environment fails after so many steps."""
    text = (
        f'{TINY}[[clients]]\nname = "mill"\nenv = "test/Broken-v0"\nkwargs = {{ fault = "{fault}", after = {after} }}\n'
    )
    return Scenario.loads(text, overrides=overrides)


FAULTS = {
    "raises": (TaskError, "client mill: test/Broken-v0: step of env copy 0 failed: RuntimeError: out of coal"),
    "nan reward": (ValueError, "client mill: .* reward is nan; correct the environment"),
    "nan observation": (ValueError, "client mill: .*entry 1 of the observation is nan; correct the environment"),
    "shape": (TaskError, r"client mill: test/Broken-v0: .*an observation has shape \(3,\); its space has \(2,\)"),
}


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("fault", FAULTS)
def test_an_environment_that_fails_in_training_is_named(tmp_path: Path, fault: str):
    kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        train(with_broken(fault, 40), tmp_path)
    saved = read_results(tmp_path)
    assert (saved["status"], saved["rounds"]) == ("failed", 1)
    assert "client mill: " in saved["error"]
    assert len(list((tmp_path / "policies").iterdir())) == 4


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("fault", ["nan reward", "nan observation"])
def test_non_finite_values_in_an_evaluation_are_an_error(tmp_path: Path, fault: str):
    with pytest.raises(ValueError, match=f"client mill: at step 2 of an evaluation episode, the {fault[4:]} is not"):
        train(with_broken(fault, 2), tmp_path)
    assert read_results(tmp_path)["rounds"] == 0


@pytest.mark.usefixtures("broken")
def test_endless_episodes_are_truncated_in_evaluation_and_refused_with_groups():
    result = train(with_broken("endless", 0, "evaluate.step_limit=20", "rounds=1"))
    assert result.clients["mill"].after == 20.0
    assert result.clients["mill"].episodes == 0
    assert result.clients["mill"].best is None
    with pytest.raises(ValueError, match=r"client mill: .*never end an episode.*set rollout\.episode_limit"):
        train(with_broken("endless", 0, "objective.preset=grpo", "group.size=2"))
