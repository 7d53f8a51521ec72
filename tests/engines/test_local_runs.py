"""Whole federations on the local engine, with clients that learn: a run is reproduced, also after it was stopped."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from safetensors.numpy import load_file

from grpo_fed.engines.alone import train
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.start import resume, run
from grpo_fed.engines.workers.fork_server import is_possible
from grpo_fed.reports.figures.write import draw_all
from grpo_fed.rl.device import resolve_device
from grpo_fed.runs.checkpoint import latest
from grpo_fed.runs.history import read_history
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.runs.tracking.selection import tracked_metrics
from grpo_fed.scenario.scenario import Scenario

ROOT = Path(__file__).parents[2]
needs_workers = pytest.mark.skipif(not is_possible(), reason="worker processes need Linux")

PLAIN: dict[str, Any] = {
    "name": "carts",
    "method": "grpo",
    "rounds": 4,
    "steps": 128,
    "policy": {"hidden": [8]},
    "rollout": {"num_envs": 2, "horizon": 32},
    "objective": {"epochs": 2, "minibatches": 4},
    "evaluate": {"episodes": 2, "every": 2},
    "merge": {"threshold": 0.001},
    "clients": [
        {"name": "cart", "env": "grpo_fed/CartPole-v1", "count": 3},
        {"name": "crab", "env": "grpo_fed/CartPole-v1", "kwargs": {"swap_actions": True}},
    ],
}


def scenario_of(**settings: Any) -> Scenario:
    return Scenario.model_validate(PLAIN | settings)


def shared_of(folder: Path) -> dict[str, np.ndarray]:
    """Read the shared blocks from the latest checkpoint of a run."""
    checkpoint = latest(folder)
    assert checkpoint is not None
    assert checkpoint.shared is not None
    return dict(checkpoint.shared)


def test_zeros_of_a_penalty_are_reported_and_survive_the_merge(tmp_path: Path) -> None:
    """At a weight this large every penalised row is zero after a round, for clients and in the merge; the rest not."""
    penalty = {"toward": "zero", "weight": 1e3, "blocks": ["torso.0"]}
    given = scenario_of(method="fedavg", policy={"hidden": [8], "groups": {"torso.0": "row"}}, penalty=penalty)
    run(given, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    for metrics in (lines[-1], *lines[-1]["clients"].values()):
        assert (metrics["penalty/zeros"], metrics["penalty/value"], metrics["penalty_norm/torso.0"]) == (1.0, 0.0, 0.0)
    assert tracked_metrics(lines[-1])["penalty/zeros"] == 1.0
    assert "penalty" in [drawing.name for drawing in draw_all(read_history(tmp_path))]
    for name, values in shared_of(tmp_path).items():
        assert bool(values.any()) == (not name.startswith("torso.0."))
    run(scenario_of(rounds=1), tmp_path / "without")
    assert "penalty" not in (tmp_path / "without" / "rounds.jsonl").read_text()


def content_of(folder: Path) -> dict[str, bytes]:
    """Read all that a run has left in its folder, bit for bit, but for times and the run's random name."""
    policies = {path.name: path.read_bytes() for path in (folder / "policies").iterdir()}
    shared = {name: array.tobytes() for name, array in shared_of(folder).items()}
    checkpoint = latest(folder)
    assert checkpoint is not None
    states = {
        f"{client} {name}": array.tobytes()
        for client, arrays in checkpoint.states().items()
        for name, array in arrays.items()
    }
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    text = {
        "rounds": json.dumps(without_times(rounds)).encode(),
        "results": json.dumps(without_times(results)).encode(),
    }
    return policies | shared | states | text


def without_times(document: Any) -> Any:
    """Remove from JSON what depends on a clock."""
    if isinstance(document, list):
        return [without_times(part) for part in document]
    if isinstance(document, dict):
        clocks = {"seconds", "charts/seconds", "charts/SPS", "time/round_s"}
        return {name: without_times(value) for name, value in document.items() if name not in clocks}
    return document


def failures(result: Result) -> dict[str, list[tuple[int, str]]]:
    """Return each client's failures: the round and the kind."""
    return {name: [(round, kind) for round, kind, _ in failed] for name, failed in result.missing.items()}


# The same run twice --------------------------------------------------------------------------------------------------


@needs_workers
def test_the_number_of_workers_changes_the_last_bits_alone(tmp_path: Path) -> None:
    without = run(scenario_of(), tmp_path / "0", workers=0)
    with_two = run(scenario_of(), tmp_path / "2", workers=2)
    assert without.status == with_two.status == "finished"
    assert not without.missing
    assert not with_two.missing
    assert without.bytes_up > 0
    for name, array in shared_of(tmp_path / "0").items():
        np.testing.assert_allclose(array, shared_of(tmp_path / "2")[name], atol=2e-4)
    run(scenario_of(), tmp_path / "again", workers=2)
    assert content_of(tmp_path / "again") == content_of(tmp_path / "2")


def test_an_interrupted_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    run(scenario_of(), tmp_path / "whole", workers=0)

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scenario_of(), tmp_path / "broken", stop, workers=0)
    results = json.loads((tmp_path / "broken" / "results.json").read_text())
    assert (results["status"], results["rounds"]) == ("interrupted", 2)
    assert load_policy(tmp_path / "broken", "crab").predict(np.zeros(4, np.float32)) in (0, 1)
    seen: list[int] = []
    resume(tmp_path / "broken", lambda record: seen.append(record.round))
    assert seen == [3, 4]
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "whole")


@needs_workers
def test_a_killed_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    settings = scenario_of(rounds=6, proximity={"mode": "measured", "kl_block": 0.01, "kl_joint": 0.02})
    run(settings, tmp_path / "whole", workers=2)
    (tmp_path / "carts.toml").write_text(settings.dumps())
    code = f"""
from pathlib import Path
from grpo_fed.engines.start import run
from grpo_fed.scenario.scenario import Scenario
run(Scenario.load({str(tmp_path / "carts.toml")!r}), {str(tmp_path / "killed")!r}, workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    lines = tmp_path / "killed" / "rounds.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) < 2:
        time.sleep(0.001)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoint = latest(tmp_path / "killed")
    assert checkpoint is not None
    assert 2 <= checkpoint.round < 6
    resume(tmp_path / "killed")
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


# Clients that fail ---------------------------------------------------------------------------------------------------


@needs_workers
@pytest.mark.parametrize(("how", "kind"), [("raise", "raised"), ("exit", "died"), ("hang", "late")])
def test_a_client_that_fails_is_named_and_asked_again(tmp_path: Path, how: str, kind: str) -> None:
    when = tmp_path / "when"
    clients = [
        {"name": "cart", "env": "tests.support.failing_envs:Failing-v0", "count": 2},
        {"name": "mule", "env": "tests.support.failing_envs:Failing-v0", "kwargs": {"when": str(when), "how": how}},
    ]
    settings = scenario_of(clients=clients, rounds=3, evaluate={"episodes": 1}, round={"deadline": 5.0})

    def watch(record: RoundRecord) -> None:
        when.touch() if record.round == 1 else when.unlink(missing_ok=True)

    result = run(settings, tmp_path / "run", watch, workers=3)
    assert result.status == "finished"
    assert failures(result) == {"mule": [(2, kind)]}
    ((_, _, reason),) = result.missing["mule"]
    expected = {
        "raise": "TaskError: client mule: tests.support.failing_envs:Failing-v0",
        "exit": "its process ended with exit code 5",
        "hang": "it had not answered by the deadline, and its process was stopped",
    }
    assert expected[how] in reason
    steps = {name: client.env_steps for name, client in result.clients.items()}
    assert steps == {"cart-0": 384, "cart-1": 384, "mule": 256}
    assert load_file(tmp_path / "run" / "policies" / "mule.safetensors")


@needs_workers
def test_a_resumed_run_sets_the_same_clients_aside(tmp_path: Path) -> None:
    when = tmp_path / "when"
    clients = [
        {"name": "cart", "env": "tests.support.failing_envs:Failing-v0", "count": 2},
        {"name": "mule", "env": "tests.support.failing_envs:Failing-v0", "kwargs": {"when": str(when), "how": "raise"}},
    ]
    settings = scenario_of(clients=clients, rounds=4, evaluate={"episodes": 1})

    def watch(record: RoundRecord) -> None:
        when.touch() if record.round == 1 else when.unlink(missing_ok=True)

    def stop(record: RoundRecord) -> None:
        watch(record)
        if record.round == 2:
            raise KeyboardInterrupt

    run(settings, tmp_path / "whole", watch, workers=1)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "stopped", stop, workers=1)
    with LocalEngine.resumed(tmp_path / "stopped") as engine:
        assert engine.schedule.set_aside == [("mule",)]
        assert engine.schedule.workers == 1
        engine.run(watch)
    assert content_of(tmp_path / "stopped") == content_of(tmp_path / "whole")


# Folders, devices and environments -----------------------------------------------------------------------------------


def test_results_name_the_device_that_auto_stands_for() -> None:
    result = run(scenario_of(rounds=1, device="auto"), workers=0)
    assert result.device == str(resolve_device("auto"))


def test_a_run_without_a_folder_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = run(scenario_of(rounds=1), workers=0)
    assert result.status == "finished"
    assert result.out is None
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_replaces_the_states_of_an_earlier_one(tmp_path: Path) -> None:
    run(scenario_of(rounds=1), tmp_path, workers=0)
    before = list((tmp_path / "clients").iterdir())
    run(scenario_of(rounds=1), tmp_path, workers=0, replace=True)
    after = list((tmp_path / "clients").iterdir())
    assert len(before) == len(after) == 1
    assert before != after


def test_a_run_without_a_federation_cannot_be_resumed_as_one(tmp_path: Path) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(scenario_of(rounds=2, method="local"), tmp_path, stop)
    with pytest.raises(ValueError, match="is of a run without federation"):
        resume(tmp_path)


def test_an_environment_that_workers_cannot_import_runs_in_process(tmp_path: Path) -> None:
    gymnasium.register("OnlyHere-v0", entry_point=lambda **kwargs: CartPoleEnv(**kwargs), max_episode_steps=20)
    try:
        settings = scenario_of(clients=[{"name": "cart", "env": "OnlyHere-v0", "count": 2}], rounds=1)
        with LocalEngine(settings) as engine:
            assert engine.schedule.workers == 0
            assert engine.run().status == "finished"
        with pytest.raises(ValueError, match="a worker process cannot make it"):
            LocalEngine(settings, workers=2)
    finally:
        del gymnasium.registry["OnlyHere-v0"]
