"""Clients whose levels move: resumed to the bit, independent of each other, and steered by a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from grpo_fed.engines.alone import AloneEngine, train
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.federation.state_store import StateStore
from grpo_fed.federation.steering import first_states, states_of_clients, steer
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.rl.advantages import learning_targets
from grpo_fed.rl.batch import make_batch
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_gym_tasks

TEXT = """
name = "a"
rounds = 4
steps = 128
method = "fedavg"
[policy]
hidden = [8]
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 1
minibatches = 1
[normalise]
observations = true
[evaluate]
episodes = 4
every = 1
[checkpoint]
keep = 5
[[clients]]
name = "pole"
env = "grpo_fed/CartPole-v1"
count = 2
curriculum = { kind = "expanding", ranges = { length = [0.05, 2.0] }, start = { length = [0.4, 0.6] }, target = 15, \
step = 0.5, episodes = 2 }
[[clients]]
name = "wrapped"
env = "CartPole-v1"
wrappers = ["gymnasium.wrappers:RecordEpisodeStatistics"]
"""
SERVER = "curriculum.by=server"
KINDS = {
    "uniform": [],
    "schedule": ["clients.pole.curriculum.kind=schedule"],
    "return": ["clients.pole.curriculum.kind=return"],
    "expanding": [],
    "learnability": ["clients.pole.curriculum.kind=learnability", "clients.pole.curriculum.levels=8"],
    "replay": ["clients.pole.curriculum.kind=replay", "clients.pole.curriculum.levels=6", "normalise.rewards=true"],
    "server": [SERVER],
    "group": ["objective.preset=grpo", "group.size=2", "rollout.episode_limit=30"],
    "personal": ["personal.model=true", "steps=256"],
    "twins": ["evaluate.twins=true"],
}


def scenario(*overrides: str) -> Scenario:
    return Scenario.loads(TEXT, overrides=overrides)


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
    """Read the states of all clients, and the shared blocks, in the checkpoint after a round."""
    files = (folder / "checkpoints" / f"round-{round:04d}").glob("**/*.safetensors")
    return {file.stem: load_file(file) for file in files}


def assert_same(states: dict[str, dict[str, np.ndarray]], others: dict[str, dict[str, np.ndarray]]) -> None:
    assert states.keys() == others.keys()
    for client, state in states.items():
        assert state.keys() == others[client].keys()
        for name, array in state.items():
            np.testing.assert_array_equal(array, others[client][name], f"{client}: {name}")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


# Exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_levels_is_resumed_to_the_bit(kind: str, tmp_path: Path):
    given = scenario(*KINDS[kind])
    run(given, tmp_path / "whole")
    run(given, tmp_path / "stopped", 2)
    with LocalEngine.resumed(tmp_path / "stopped") as engine:
        engine.run()
    assert_same(read_states(tmp_path / "stopped", 4), read_states(tmp_path / "whole", 4))
    last = [
        {key: value for key, value in read_lines(tmp_path / name)[-1].items() if "return" in key or "curric" in key}
        for name in ("stopped", "whole")
    ]
    assert last[0] == last[1]
    assert "curriculum/size" in last[0]


def test_clients_that_learn_alone_are_resumed_with_their_levels(tmp_path: Path):
    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    train(scenario(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(scenario(), tmp_path / "stopped", stop)
    with AloneEngine.resumed(tmp_path / "stopped") as engine:
        engine.run()
    assert_same(read_states(tmp_path / "stopped", 4), read_states(tmp_path / "whole", 4))
    with pytest.raises(ValueError, match=r'curriculum\.by = "server" is for a federation'):
        AloneEngine(scenario(SERVER))


def test_levels_of_a_client_do_not_depend_on_the_others_nor_on_processes(tmp_path: Path):
    given = scenario("clients.pole.curriculum.kind=learnability", "normalise.rewards=true")
    setup = FederationSetup.of(given)
    start, states = setup.shared_blocks.initial.numpy(), []
    for names, is_kept in ((("pole-0", "pole-1"), True), (("pole-1",), True), (("pole-1",), False)):
        store = StateStore(tmp_path / f"{len(states)}", durable=False)
        tasks = list(setup.tasks_by_policy[0])
        clients = Clients(given, setup.shared_blocks, tasks, store)
        for round in (1, 2, 4):
            # pole-0 begins a round later: then pole-1 goes on while the other one takes its first levels
            asked = names[-1:] if round == 1 else names
            clients.answer(dict.fromkeys(asked, Train(Start("run", round, start), 0.0, 0.0)))
            if not is_kept:
                clients.close()
                clients = Clients(given, setup.shared_blocks, tasks, store)
        clients.close()
        stored = store.load("run", "pole-1", before=5)
        assert stored is not None
        states.append({"pole-1": dict(stored.arrays)})
    assert_same(states[2], states[1])
    assert states[0]["pole-1"].keys() == states[1]["pole-1"].keys()
    for name in ("curriculum", "rollout.levels", "rollout.streams", "rollout.numbers"):
        np.testing.assert_array_equal(states[0]["pole-1"][name], states[1]["pole-1"][name], name)


def test_a_client_without_levels_learns_the_same_bits_beside_one_with_them(tmp_path: Path):
    given = scenario("clients.1.env=grpo_fed/CartPole-v1", "clients.1.wrappers=[]", "method=local")
    run(given, tmp_path / "with")
    plain = given.clients[0].model_copy(update={"curriculum": None})
    run(given.model_copy(update={"clients": [plain, given.clients[1]]}), tmp_path / "without")
    states = [read_states(tmp_path / name, 4) for name in ("with", "without")]
    assert_same({"wrapped": states[0]["wrapped"]}, {"wrapped": states[1]["wrapped"]})
    assert not np.array_equal(states[0]["pole-0"]["parameters"], states[1]["pole-0"]["parameters"])


# Levels of episodes --------------------------------------------------------------------------------------------------


def test_an_episode_counts_for_the_level_that_it_began_with():
    given = scenario("clients.pole.count=1", "clients.pole.curriculum.kind=schedule", "clients.pole.curriculum.until=1")
    learner = StackedLearner(resolve_gym_tasks(given)[:1], given)
    curriculum = learner.levels.curricula[0]
    seen = []
    for begin in (0.0, 0.9):
        (report,) = learner.train(128, begin, begin)
        seen.append([episode.level[0] for episode in report.episodes])
        assert report.more["curriculum_low/length"] == pytest.approx(0.4 - begin * 0.35)
    learner.close()
    assert all(0.4 <= level <= 0.6 for level in seen[0])
    running = seen[1][:4]  # one of each copy had begun in the round before
    assert any(0.4 <= level <= 0.6 for level in running)
    assert any(level > 0.6 for level in seen[1])
    assert curriculum.names == ("length",)


def test_a_level_is_scored_by_the_errors_of_its_own_steps():
    given = scenario("clients.pole.count=1", *KINDS["replay"], "clients.pole.curriculum.levels=20")
    learner, other = (StackedLearner(resolve_gym_tasks(given)[:1], given) for _ in range(2))
    learner.train(128)
    other.collector.begin(other._first_streams())
    playing = other.collector.levels[0][:, 0].tolist()
    other.levels.begin_round(other.updates_done, 0.0)
    trajectories, _ = other.collect(np.array([True]))
    batch = make_batch(other.policy, other.stacks[0].views, trajectories, slice(0, 1), critic=True)
    targets = learning_targets(batch, None, torch.tensor([500]), given)
    errors: dict[float, list[float]] = {}
    for copy in range(4):
        for t in range(32):
            error = float(targets.returns[0, t, copy]) - float(batch.values[0, t, copy])
            errors.setdefault(playing[copy], []).append(abs(error))
            if bool(batch.ends[0, t, copy]):
                playing[copy] = float(other.collector.coming_levels[0][copy, 0])
    seeds, scores, last = learner.levels.states[0].reshape(3, -1)
    found = {seed - 1: score for seed, score in zip(seeds.tolist(), scores.tolist(), strict=True) if seed}
    assert found == {seed: pytest.approx(np.mean(each), rel=1e-6) for seed, each in errors.items()}
    assert len(found) > 4
    assert set(last[seeds > 0].tolist()) == {1.0}
    for each in (learner, other):
        each.close()


def test_episodes_of_one_group_are_of_one_level():
    given = scenario("clients.pole.count=1", *KINDS["group"], "clients.pole.curriculum.kind=uniform")
    learner = StackedLearner(resolve_gym_tasks(given)[:1], given)
    (report,) = learner.train(30)
    learner.close()
    first = report.episodes[:4]
    assert len({episode.level for episode in first}) == 2
    levels = learner.collector.levels[0][:, 0]
    assert levels[0] == levels[1] != levels[2] == levels[3]


# The server ----------------------------------------------------------------------------------------------------------


def reply(*evidence: float) -> Trained:
    return Trained(np.zeros(0, np.float32), 10, 5, 0.0, 0.0, {}, evidence=evidence)


def test_a_server_adds_up_what_the_returns_of_all_clients_say():
    given = scenario(SERVER, "clients.pole.curriculum.episodes=3")
    states = first_states(given)
    assert states == {"pole": (0.0,) * 6}
    assert states_of_clients(given, states) == {"pole-0": (0.0,) * 6, "pole-1": (0.0,) * 6}
    one = steer(given, states, {"pole-1": reply(2, 0, 40, 0)})
    assert one["pole"] == (0.0, 0.0, 2.0, 0.0, 40.0, 0.0)
    both = steer(given, states, {"pole-1": reply(2, 0, 40, 0), "pole-0": reply(1, 1, 5, 30), "wrapped": reply()})
    assert both["pole"] == (0.5, 0.0, 0.0, 1.0, 0.0, 30.0)  # the mean at the lowest length is 45 / 3


def test_all_clients_of_an_entry_train_in_the_box_of_the_server(tmp_path: Path):
    run(scenario(SERVER, "clients.pole.curriculum.target=1", "clients.pole.curriculum.episodes=1"), tmp_path / "run")
    for line in read_lines(tmp_path / "run"):
        clients = line["clients"]
        assert clients["pole-0"]["curriculum/size"] == clients["pole-1"]["curriculum/size"]
        assert "curriculum/size" not in clients["wrapped"]
    sizes = [line["clients"]["pole-0"]["curriculum/size"] for line in read_lines(tmp_path / "run")]
    assert sizes[0] == pytest.approx(0.2 / 1.95)
    assert sizes[-1] == 1.0
    state = json.loads((tmp_path / "run" / "checkpoints" / "round-0004" / "state.json").read_text())
    assert state["parts"]["server"]["curricula"]["pole"][:2] == [1.0, 1.0]


def test_a_state_of_another_curriculum_is_refused(tmp_path: Path):
    given = scenario(SERVER)
    setup = FederationSetup.of(given)
    clients = Clients(given, setup.shared_blocks, list(setup.tasks_by_policy[0]), StateStore(tmp_path, durable=False))
    start = Start("run", 1, setup.shared_blocks.initial.numpy())
    with pytest.raises(ValueError, match=r"client pole-0: the server steers a curriculum of 3 numbers.* expects 6"):
        clients.answer({"pole-0": Train(start, 0.0, 0.25, curriculum=(0.0, 0.0, 0.0))})
    clients.close()


# In words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("uniform", "Levels of pole: length 0.05 to 2. Training draws from all of this alike."),
        ("schedule", "from a box that grows from length 0.4 to 0.6 to all of this by 50% of the run."),
        ("return", "to all of this, by 0.5 of the way whenever the mean return of 2 episodes is at least 15."),
        ("replay", "and in the others again those of 64 seeds where the critic errs most."),
        ("expanding", "moves outwards by 0.5 of the way whenever the mean return of 2 episodes there is at least 15."),
        (
            "learnability",
            "from 64 levels, by how uncertain it is that an episode returns 15 or more, and 25%",
        ),
    ],
)
def test_a_curriculum_is_explained(kind: str, sentence: str):
    given = scenario(f"clients.pole.curriculum.kind={kind}")
    text = "\n".join(sentence for part in explain_scenario(given) for sentence in part.sentences)
    assert sentence in text
