"""Whole federations on the local engine, with clients that learn: the same again, and after whatever stops them."""

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
from grpo_fed.engines.local.engine import LocalEngine, federate, resume
from grpo_fed.engines.workers.fork_server import is_possible
from grpo_fed.rl.device import resolve_device
from grpo_fed.runs.checkpoint import latest
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
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
    kept = latest(folder)
    assert kept is not None
    assert kept.shared is not None
    return dict(kept.shared)


def all_of(folder: Path) -> dict[str, bytes]:
    """What a run has come to, bit for bit, without its times and its name for itself."""
    policies = {path.name: path.read_bytes() for path in (folder / "policies").iterdir()}
    shared = {name: array.tobytes() for name, array in shared_of(folder).items()}
    kept = latest(folder)
    assert kept is not None
    states = {
        f"{client} {name}": array.tobytes()
        for client, arrays in kept.states().items()
        for name, array in arrays.items()
    }
    told = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    text = {"rounds": json.dumps(timeless(told)).encode(), "results": json.dumps(timeless(results)).encode()}
    return policies | shared | states | text


def timeless(told: Any) -> Any:
    """Without what a clock says."""
    if isinstance(told, list):
        return [timeless(one) for one in told]
    if isinstance(told, dict):
        clocks = {"seconds", "charts/seconds", "charts/SPS", "time/round_s"}
        return {name: timeless(value) for name, value in told.items() if name not in clocks}
    return told


def failures(result: Result) -> dict[str, list[tuple[int, str]]]:
    return {name: [(number, kind) for number, kind, _ in every] for name, every in result.missing.items()}


# The same again ------------------------------------------------------------------------------------------------------


@needs_workers
def test_workers_change_nothing_but_the_last_bits(tmp_path: Path) -> None:
    alone = federate(scenario_of(), tmp_path / "0", workers=0)
    both = federate(scenario_of(), tmp_path / "2", workers=2)
    assert alone.status == both.status == "finished"
    assert not alone.missing
    assert not both.missing
    assert alone.bytes_up > 0
    for name, array in shared_of(tmp_path / "0").items():
        np.testing.assert_allclose(array, shared_of(tmp_path / "2")[name], atol=2e-4)
    federate(scenario_of(), tmp_path / "again", workers=2)
    assert all_of(tmp_path / "again") == all_of(tmp_path / "2")


def test_a_run_that_raises_under_way_goes_on_to_the_same_end(tmp_path: Path) -> None:
    federate(scenario_of(), tmp_path / "whole", workers=0)

    def stop(note: RoundRecord) -> None:
        if note.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(scenario_of(), tmp_path / "broken", stop, workers=0)
    results = json.loads((tmp_path / "broken" / "results.json").read_text())
    assert (results["status"], results["rounds"]) == ("interrupted", 2)
    assert load_policy(tmp_path / "broken", "crab").predict(np.zeros(4, np.float32)) in (0, 1)
    seen: list[int] = []
    resume(tmp_path / "broken", lambda note: seen.append(note.round))
    assert seen == [3, 4]
    assert all_of(tmp_path / "broken") == all_of(tmp_path / "whole")


@needs_workers
def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path: Path) -> None:
    settings = scenario_of(rounds=6, proximity={"mode": "measured", "kl_block": 0.01, "kl_joint": 0.02})
    federate(settings, tmp_path / "whole", workers=2)
    (tmp_path / "carts.toml").write_text(settings.dumps())
    code = f"""
from pathlib import Path
from grpo_fed.engines.local.engine import federate
from grpo_fed.scenario.scenario import Scenario
federate(Scenario.load({str(tmp_path / "carts.toml")!r}), {str(tmp_path / "killed")!r}, workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    lines = tmp_path / "killed" / "rounds.jsonl"
    while not lines.exists() or len(lines.read_text().splitlines()) < 2:
        time.sleep(0.001)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = latest(tmp_path / "killed")
    assert kept is not None
    assert 2 <= kept.round < 6
    resume(tmp_path / "killed")
    assert all_of(tmp_path / "killed") == all_of(tmp_path / "whole")


# When clients fail ---------------------------------------------------------------------------------------------------


@needs_workers
@pytest.mark.parametrize(("how", "kind"), [("raise", "raised"), ("exit", "died"), ("hang", "late")])
def test_a_client_that_fails_is_named_and_comes_back(tmp_path: Path, how: str, kind: str) -> None:
    when = tmp_path / "when"
    clients = [
        {"name": "cart", "env": "tests.support.failing_envs:Failing-v0", "count": 2},
        {"name": "mule", "env": "tests.support.failing_envs:Failing-v0", "kwargs": {"when": str(when), "how": how}},
    ]
    settings = scenario_of(clients=clients, rounds=3, evaluate={"episodes": 1}, round={"deadline": 5.0})

    def watch(note: RoundRecord) -> None:
        when.touch() if note.round == 1 else when.unlink(missing_ok=True)

    result = federate(settings, tmp_path / "run", watch, workers=3)
    assert result.status == "finished"
    assert failures(result) == {"mule": [(2, kind)]}
    ((_, _, reason),) = result.missing["mule"]
    said = {
        "raise": "TaskError: client mule: tests.support.failing_envs:Failing-v0",
        "exit": "its process ended with exit code 5",
        "hang": "it was still at work, and its process was stopped",
    }
    assert said[how] in reason
    steps = {name: client.env_steps for name, client in result.clients.items()}
    assert steps == {"cart-0": 384, "cart-1": 384, "mule": 256}
    assert load_file(tmp_path / "run" / "policies" / "mule.safetensors")


@needs_workers
def test_who_was_asked_apart_is_so_after_the_run_was_stopped(tmp_path: Path) -> None:
    when = tmp_path / "when"
    clients = [
        {"name": "cart", "env": "tests.support.failing_envs:Failing-v0", "count": 2},
        {"name": "mule", "env": "tests.support.failing_envs:Failing-v0", "kwargs": {"when": str(when), "how": "raise"}},
    ]
    settings = scenario_of(clients=clients, rounds=4, evaluate={"episodes": 1})

    def watch(note: RoundRecord) -> None:
        when.touch() if note.round == 1 else when.unlink(missing_ok=True)

    def stop(note: RoundRecord) -> None:
        watch(note)
        if note.round == 2:
            raise KeyboardInterrupt

    federate(settings, tmp_path / "whole", watch, workers=1)
    with pytest.raises(KeyboardInterrupt):
        federate(settings, tmp_path / "stopped", stop, workers=1)
    with LocalEngine.resumed(tmp_path / "stopped") as federation:
        assert federation.grid.schedule.set_aside == [("mule",)]
        assert federation.grid.workers == 1
        federation.run(watch)
    assert all_of(tmp_path / "stopped") == all_of(tmp_path / "whole")


# Folders and what does not go ----------------------------------------------------------------------------------------


def test_results_say_what_was_computed_on_and_not_what_was_asked_for() -> None:
    result = federate(scenario_of(rounds=1, device="auto"), workers=0)
    assert result.device == str(resolve_device("auto"))


def test_without_a_folder_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = federate(scenario_of(rounds=1), workers=0)
    assert result.status == "finished"
    assert result.out is None
    assert list(tmp_path.iterdir()) == []


def test_clients_know_nothing_of_an_earlier_run_in_their_folder(tmp_path: Path) -> None:
    federate(scenario_of(rounds=1), tmp_path, workers=0)
    before = list((tmp_path / "clients").iterdir())
    federate(scenario_of(rounds=1), tmp_path, workers=0)
    after = list((tmp_path / "clients").iterdir())
    assert len(before) == len(after) == 1
    assert before != after


def test_clients_of_a_run_without_federation_cannot_go_on_in_one(tmp_path: Path) -> None:
    def stop(note: RoundRecord) -> None:
        if note.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(scenario_of(rounds=2, method="local"), tmp_path, stop)
    with pytest.raises(ValueError, match="is of a run without federation"):
        resume(tmp_path)


def test_an_environment_that_only_this_process_knows_is_played_here(tmp_path: Path) -> None:
    gymnasium.register("OnlyHere-v0", entry_point=lambda **kwargs: CartPoleEnv(**kwargs), max_episode_steps=20)
    try:
        settings = scenario_of(clients=[{"name": "cart", "env": "OnlyHere-v0", "count": 2}], rounds=1)
        with LocalEngine(settings) as federation:
            assert federation.grid.workers == 0
            assert federation.run().status == "finished"
        with pytest.raises(ValueError, match="no worker process can know it"):
            LocalEngine(settings, workers=2)
    finally:
        del gymnasium.registry["OnlyHere-v0"]
