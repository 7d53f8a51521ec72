"""A client's task may change during a run: what it learns then, and what stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from safetensors.numpy import load_file

from grpo_fed.engines.alone import AloneEngine, train
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Start, Train
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.federation.state_store import StateStore
from grpo_fed.reports.episodes import first_policy
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import EnvCache
from grpo_fed.tasks.resolve import resolve_task, resolve_tasks

SCENARIO = """
name = "a"
rounds = 4
steps = 100
method = "local"
[policy]
hidden = [8]
[rollout]
num_envs = 2
horizon = 32
[objective]
epochs = 2
minibatches = 2
[normalise]
observations = true
rewards = true
[evaluate]
episodes = 2
every = 1
[checkpoint]
keep = 5
[[clients]]
name = "same"
env = "grpo_fed/CartPole-v1"
count = 2
spread = { length = [0.2, 0.8] }
[[clients]]
name = "late"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "gym"
env = "CartPole-v1"
"""
LATE = "clients.late.changes=[{ round = 3, kwargs = { length = 0.9, swap_actions = true } }]"
GYM = "clients.gym.changes=[{ round = 3, kwargs = { sutton_barto_reward = true } }]"
PERSONAL = ["personal.model=true", "steps=128"]
GROUPS = ["objective.preset=grpo", "group.size=2", "rollout.episode_limit=20"]


class Pay(gymnasium.Env[Any, Any]):
    """Pays the same in each of five steps."""

    observation_space: spaces.Space[Any] = spaces.Box(-1, 1, (1,))
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def __init__(self, pay: float = 1.0, entries: int = 1) -> None:
        self.pay = pay
        self.observation_space = spaces.Box(-1, 1, (entries,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample() * 0, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample() * 0, self.pay, self.steps == 5, False, {}


gymnasium.register("Pay-v0", Pay)

PAID = """
name = "paid"
rounds = 4
steps = 64
policy = { hidden = [4] }
rollout = { num_envs = 2, horizon = 32 }
evaluate = { episodes = 2, every = 1 }
[[clients]]
name = "c"
env = "Pay-v0"
count = 2
spread = { pay = [3.0, 4.0] }
changes = [{ round = 2, kwargs = { pay = 10.0 } }, { round = 4, kwargs = { pay = 20.0 } }]
"""


def scenario(*overrides: str) -> Scenario:
    return Scenario.loads(SCENARIO, overrides=overrides)


def run(given: Scenario, folder: Path, stop_after: int | None = None) -> None:
    """Run a federation; stop it, like Ctrl-C does, when this round is recorded."""

    def stop(record: RoundRecord) -> None:
        if record.round == stop_after:
            raise KeyboardInterrupt

    with LocalEngine(given, folder, workers=0) as engine:
        if stop_after is None:
            engine.run()
        else:
            with pytest.raises(KeyboardInterrupt):
                engine.run(stop)


def read_states(folder: Path, round: int) -> dict[str, dict[str, np.ndarray]]:
    """Read the states of all clients in the checkpoint after a round."""
    files = (folder / "checkpoints" / f"round-{round:04d}").glob("**/*.safetensors")
    return {file.stem: load_file(file) for file in files if file.stem != "shared"}


def assert_same_state(state: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert state.keys() == other.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(array, other[name], name)


def read_scores(folder: Path) -> dict[str, list[float]]:
    """Read each client's evaluated returns, one for each round from 0."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    before = {
        name: each["return_before"]
        for name, each in json.loads((folder / "results.json").read_text())["clients"].items()
    }
    return {
        name: [score, *(line["clients"][name]["eval/episodic_return"] for line in lines)]
        for name, score in before.items()
    }


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_each_change_is_on_top_of_those_before():
    changes = "[{ round = 3, kwargs = { length = 0.9 } }, { round = 5, kwargs = { gravity = 5.0 } }]"
    tasks = {task.client: task for task in resolve_tasks(scenario(f"clients.same.changes={changes}"))}
    task = tasks["same-0"]
    assert [task.at(round).kwargs for round in (0, 1, 2)] == [{"length": 0.2}] * 3
    assert [task.at(round).kwargs for round in (3, 4)] == [{"length": 0.9}] * 2
    assert [task.at(round).kwargs for round in (5, 9)] == [{"length": 0.9, "gravity": 5.0}] * 2
    assert tasks["late"].at(9) is tasks["late"]
    assert resolve_task(scenario(f"clients.same.changes={changes}"), "same-0") == task


def test_the_step_limit_may_change():
    changes = "clients.late.changes=[{ round = 3, kwargs = { max_episode_steps = 700 } }]"
    task = resolve_task(scenario(changes), "late")
    assert [task.at(round).episode_limit for round in (2, 3)] == [500, 700]
    assert task.shape.episode_limit == 700


@pytest.mark.parametrize("module", [[], ["policy.module=tests.scenario.test_knobs:UserModule"]])
def test_a_change_of_the_spaces_is_refused(module: list[str]):
    given = Scenario.loads(PAID, overrides=["clients.c.changes=[{ round = 3, kwargs = { entries = 2 } }]", *module])
    with pytest.raises(ValueError, match=r"client c-0: changes: from round 3 on Pay-v0 has the spaces .*change only"):
        FederationSetup.of(given)


def test_an_impossible_argument_is_refused_with_the_round_of_its_change():
    given = scenario("clients.late.changes=[{ round = 3, kwargs = { lenght = 0.9 } }]")
    with pytest.raises(ValueError, match=r'client late: .*did you mean "length"\? \(changes, from round 3 on\)'):
        FederationSetup.of(given)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ("[{ round = 1, kwargs = { length = 0.9 } }]", "must be 2 or more"),
        ("[{ round = 3, kwargs = {} }]", "must have 1 or more items"),
        ("[{ round = 3, kwargs = { length = 1.0 } }, { round = 3, kwargs = { length = 2.0 } }]", "after round 3"),
        ("[{ round = 3, kwargs = { render_mode = 'human' } }]", "slows training down"),
    ],
)
def test_mistakes_in_changes_are_found_in_the_file(changes: str, error: str):
    with pytest.raises(ValueError, match=error):
        scenario(f"clients.late.changes={changes}")


def test_a_scenario_with_changes_is_written_and_read_back():
    given = scenario(LATE, GYM)
    assert Scenario.loads(given.dumps()) == given


def test_a_change_after_the_last_round_is_explained():
    text = "\n".join(sentence for part in explain_scenario(scenario(LATE, "rounds=2")) for sentence in part.sentences)
    assert "The task of late changes in round 3, which a run of 2 rounds does not reach" in text


def test_environments_of_the_task_before_are_closed():
    task = resolve_task(scenario(GYM), "gym")
    cache, closed = EnvCache(), []
    first, second = cache.take(task), cache.take(task)
    for env in (first, second):
        env.close = lambda env=env: closed.append(env)  # type: ignore[method-assign, misc]
    cache.put(task, first)
    changed = cache.take(task.at(3))
    assert closed == [first]
    assert changed not in (first, second)
    cache.put(task, second)
    assert closed == [first, second]
    cache.put(task.at(3), changed)
    assert cache.take(task.at(3)) is changed
    changed.close()


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [LATE, GYM])
def test_clients_that_do_not_change_learn_the_same_bits(change: str, tmp_path: Path):
    run(scenario(), tmp_path / "without")
    run(scenario(change), tmp_path / "with")
    changed = "late" if change is LATE else "gym"
    for round in (2, 3, 4):
        before, after = read_states(tmp_path / "without", round), read_states(tmp_path / "with", round)
        for name in {"same-0", "same-1", "late", "gym"} - {changed}:
            assert_same_state(after[name], before[name])
        if round == 2:
            assert_same_state(after[changed], before[changed])
        else:
            assert not np.array_equal(after[changed]["parameters"], before[changed]["parameters"])


@pytest.mark.parametrize("stop_after", [1, 2, 3])
@pytest.mark.parametrize("more", [[], PERSONAL, GROUPS])
def test_a_run_is_resumed_before_at_and_after_a_change(stop_after: int, more: list[str], tmp_path: Path):
    given = scenario(LATE, GYM, *more)
    run(given, tmp_path / "whole")
    run(given, tmp_path / "stopped", stop_after)
    with LocalEngine.resumed(tmp_path / "stopped") as engine:
        engine.run()
    expected = read_states(tmp_path / "whole", 4)
    for name, state in read_states(tmp_path / "stopped", 4).items():
        assert_same_state(state, expected[name])
    assert read_scores(tmp_path / "stopped") == read_scores(tmp_path / "whole")


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_clients_that_learn_alone_are_resumed_around_a_change(stop_after: int, tmp_path: Path):
    def stop(record: RoundRecord) -> None:
        if record.round == stop_after:
            raise KeyboardInterrupt

    given = scenario(LATE, GYM)
    train(given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(given, tmp_path / "stopped", stop)
    with AloneEngine.resumed(tmp_path / "stopped") as engine:
        engine.run()
    expected = read_states(tmp_path / "whole", 4)
    for name, state in read_states(tmp_path / "stopped", 4).items():
        assert_same_state(state, expected[name])


def test_a_client_in_a_process_of_its_own_for_every_message_changes_in_the_same_way(tmp_path: Path):
    setup = FederationSetup.of(scenario(LATE, GYM))
    start = setup.shared_blocks.initial.numpy()
    states = []
    for folder, is_kept in ((tmp_path / "kept", True), (tmp_path / "new", False)):
        store = StateStore(folder, durable=False)
        clients = Clients(setup.scenario, setup.shared_blocks, list(setup.tasks.values()), store)
        for round in (1, 2, 4):  # as if it had not been sampled for round 3
            clients.answer(dict.fromkeys(clients.names, Train(Start("run", round, start), 0.0, 0.0)))
            if not is_kept:
                clients.close()
                clients = Clients(setup.scenario, setup.shared_blocks, list(setup.tasks.values()), store)
        clients.close()
        states.append({name: store.load("run", name, before=5) for name in clients.names})
    for name, stored in states[0].items():
        other = states[1][name]
        assert stored is not None
        assert other is not None
        assert_same_state(dict(stored.arrays), dict(other.arrays))


# Evaluating -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_federation", [True, False])
def test_evaluations_are_of_the_task_of_their_round(is_federation: bool, tmp_path: Path):
    given = Scenario.loads(PAID)
    if is_federation:
        run(given, tmp_path / "run")
    else:
        train(given, tmp_path / "run")
    scores = read_scores(tmp_path / "run")  # five steps
    assert scores == {"c-0": [15, 15, 50, 50, 100], "c-1": [20, 20, 50, 50, 100]}
    for client, first in (("c-0", 15), ("c-1", 20)):
        policy = load_policy(tmp_path / "run", client)
        assert policy.play().score == 100
        assert first_policy(policy).play().score == first


def test_a_run_that_ends_before_a_change_is_played_in_the_task_of_its_last_round(tmp_path: Path):
    run(Scenario.loads(PAID), tmp_path / "run", stop_after=2)
    assert load_policy(tmp_path / "run", "c-0").play().score == 50
