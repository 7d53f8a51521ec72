"""Clients: what a client learns does not depend on other clients, on the process, or on repeated instructions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.runs.metrics import is_reported
from grpo_fed.runs.policies import load_policy
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

SMALL = """
name = "small"
rounds = 4
steps = 200
[policy]
hidden = [8, 8]
[rollout]
num_envs = 4
horizon = 32
[objective]
epochs = 2
minibatches = 2
learning_rate = 1e-2
[proximity]
states = 48
[evaluate]
episodes = 4
"""
CARTS = """
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = 3
spread = { length = [0.1, 0.9] }
"""
NAMES = ("cart-0", "cart-1", "cart-2")
Kind = TypeVar("Kind", bound=Answer)


def scenario(*overrides: str, clients: str = CARTS) -> Scenario:
    return Scenario.loads(SMALL + clients, overrides=overrides)


def make_clients(given: Scenario, folder: Path, *names: str) -> Clients:
    """All clients of a scenario, or those of these names."""
    tasks = [task for task in resolve_tasks(given) if not names or task.client in names]
    return Clients(given, resolve_shared_blocks(given), tasks, StateStore(folder, durable=False))


def answer_all(clients: Clients, instructions: Mapping[str, Any], kind: type[Kind]) -> dict[str, Kind]:
    answers = {name: answer for name, answer in clients.answer(instructions).items() if isinstance(answer, kind)}
    assert list(answers) == [name for name in clients.names if name in instructions]
    return answers


def train_all(
    clients: Clients, round: int, shared: np.ndarray, names: Sequence[str] = NAMES, departed: tuple[int, ...] = ()
) -> dict[str, Trained]:
    """Train for one round of four, with everything else that an instruction can request."""
    start, plan = Start("run", round, shared, departed), EvaluationPlan(round - 1)
    instruction = Train(start, (round - 1) / 4, round / 4, measure_last_step=True, evaluate_first=plan)
    return answer_all(clients, dict.fromkeys(names, instruction), Trained)


def random_shared(round: int, size: int) -> np.ndarray:
    """Shared blocks of a round, the same for all clients."""
    return 0.3 * np.random.default_rng(round).normal(size=size).astype(np.float32)


def as_dict(played: EvaluationSummary | None) -> dict[str, float]:
    """All numbers of a summary by name."""
    return {} if played is None else vars(played)


def assert_alike(one: Trained, other: Trained) -> None:
    """Equal up to the order of float32 sums."""
    np.testing.assert_allclose(one.point, other.point, rtol=2e-3, atol=2e-4)
    assert (one.steps, one.episodes) == (other.steps, other.episodes)
    assert (one.gain, one.spread) == pytest.approx((other.gain, other.spread), rel=1e-5, abs=1e-6)
    assert one.metrics.keys() == other.metrics.keys()
    for name in one.metrics.keys() - {"charts/seconds"}:
        assert one.metrics[name] == pytest.approx(other.metrics[name], rel=2e-3, abs=1e-4), name
    assert (one.fisher is None) == (other.fisher is None)
    if one.fisher is not None and other.fisher is not None:
        np.testing.assert_allclose(one.fisher, other.fisher, rtol=0.02, atol=1e-4)
    assert (one.kl is None) == (other.kl is None)
    assert one.kl == (None if other.kl is None else pytest.approx(other.kl, rel=5e-3, abs=1e-6))
    assert as_dict(one.evaluation) == as_dict(other.evaluation)


def assert_the_same_bits(one: Mapping[str, Trained], other: Mapping[str, Trained]) -> None:
    """Equal bit for bit, except for measured times."""
    assert one.keys() == other.keys()
    for name, mine in one.items():
        theirs = other[name]
        assert mine.point.tobytes() == theirs.point.tobytes()
        assert (mine.fisher is None) == (theirs.fisher is None)
        assert mine.fisher is None or theirs.fisher is None or mine.fisher.tobytes() == theirs.fisher.tobytes()
        quiet = [{k: v for k, v in each.metrics.items() if k != "charts/seconds"} for each in (mine, theirs)]
        assert quiet[0] == quiet[1]
        for field in ("steps", "episodes", "gain", "spread", "kl"):
            assert getattr(mine, field) == getattr(theirs, field), field
        assert as_dict(mine.evaluation) == as_dict(theirs.evaluation)


METHODS = {
    "measured": ("normalise.observations=true", "normalise.rewards=true"),
    "quadratic": ("proximity.mode=quadratic", "trust.reference=shared", "trust.region=adaptive"),
    "ditto": ("method=ditto", "normalise.observations=true", "steps=400"),
    "fedrep": ("method=fedrep",),
    "fedprox": ("method=fedprox", "penalty.squared=1.0"),
    "trpo": ("objective.preset=trpo", "penalty.squared=1.0"),
    "episodes": ("objective.preset=grpo", "group.size=2", "rollout.episode_limit=40", "normalise.observations=true"),
}


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_a_client_learns_the_same_alone_and_with_changing_others(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """In round 2 the last client joins, and the first is absent. 200 steps a round are not whole batches of 128: by
    their own counts, clients with two rounds would do two batches in the third, and one with three a single one.
    """
    given = scenario(*overrides)
    together = make_clients(given, tmp_path / "together")
    alone = {name: make_clients(given, tmp_path / "alone", name) for name in NAMES}
    size = together.shared_blocks.size
    for round, names in ((1, NAMES[:2]), (2, NAMES[1:]), (3, NAMES), (4, NAMES)):
        all_of_them = train_all(together, round, random_shared(round, size), names)
        for name in names:
            assert_alike(all_of_them[name], train_all(alone[name], round, random_shared(round, size), [name])[name])
    for clients in (together, *alone.values()):
        clients.close()


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_a_repeated_round_gives_the_same_bits_in_any_process(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """In the same process, in another one, or in one that has gone on since; and so do the rounds that follow."""
    given = scenario(*overrides)
    first, other = make_clients(given, tmp_path), make_clients(given, tmp_path)
    size = first.shared_blocks.size
    shared = {round: random_shared(round, size) for round in (1, 2, 3)}
    train_all(first, 1, shared[1])
    second, after_second = train_all(first, 2, shared[2]), states(tmp_path, 2)
    third = train_all(first, 3, shared[3])
    assert_the_same_bits(second, train_all(first, 2, shared[2]))
    assert_the_same_states(after_second, states(tmp_path, 2))
    assert_the_same_bits(third, train_all(other, 3, shared[3]))
    assert_the_same_bits(second, train_all(other, 2, shared[2]))
    assert_the_same_bits(third, train_all(first, 3, shared[3]))
    first.close()
    other.close()


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_a_loaded_learner_has_the_whole_state(overrides: tuple[str, ...]) -> None:
    """One of two clients has not stepped yet: its state is that of a new learner."""
    given = scenario(*overrides)
    tasks = resolve_tasks(given)[:2]
    one, both = StackedLearner(tasks[:1], given), StackedLearner(tasks, given)
    one.train(200)
    both.load([one.state(0), both.state(1)])
    for name, array in one.state(0).items():
        assert both.state(0)[name].tobytes() == array.tobytes(), name
    fresh = StackedLearner(tasks[1:], given)
    np.testing.assert_array_equal(both.state(1)["parameters"], fresh.state(0)["parameters"])
    assert both.state(1)["progress"].tolist() == [0, 0, 0]
    one.load([fresh.state(0)])
    for name, array in fresh.state(0).items():
        assert one.state(0)[name].tobytes() == array.tobytes(), name
    assert one.state(0).keys() == fresh.state(0).keys()
    for learner in (one, both, fresh):
        learner.close()


def test_only_valid_steps_become_measurement_states() -> None:
    """Episodes have different lengths, and copies wait for the longest; here all valid steps are sampled."""
    given = scenario(*METHODS["episodes"], "proximity.states=10000")
    learner = StackedLearner(resolve_tasks(given), given)
    for report, sampled in zip(learner.train(1), learner.measurement_states, strict=True):
        assert len(sampled) == report.steps < 4 * max(episode.length for episode in report.episodes)
    learner.close()


def states(folder: Path, round: int) -> dict[str, dict[str, np.ndarray]]:
    return {name: load_file(folder / "run" / name / f"round-{round:04d}.safetensors") for name in NAMES}


def assert_the_same_states(one: Mapping[str, Mapping[str, np.ndarray]], other: Mapping[str, Any]) -> None:
    for client, state in one.items():
        assert state.keys() == other[client].keys()
        for name, array in state.items():
            assert array.tobytes() == other[client][name].tobytes(), f"{client}: {name}"


def test_a_client_that_shares_nothing_learns_as_if_alone(tmp_path: Path) -> None:
    """Its parameters are equal bit for bit, and its answer is that of the learner's report."""
    given = scenario("method=local", "steps=256")
    clients, learner = make_clients(given, tmp_path), StackedLearner(resolve_tasks(given), given)
    means: list[float] = []
    for round in (1, 2, 3):
        found = train_all(clients, round, np.zeros(0, np.float32))["cart-1"]
        report = learner.train(256, (round - 1) / 3, round / 3)[1]
        scores = [episode.score for episode in report.episodes]
        means.append(float(np.mean(scores)))
        assert found.gain == pytest.approx(means[-1] - means[-2] if round > 1 else 0.0)
        assert found.spread == pytest.approx(np.std(scores))
        assert (found.steps, found.episodes) == (256, len(scores))
        assert all(is_reported(name) for name in found.metrics)
        assert found.metrics["charts/episodic_return"] == means[-1]
        assert found.metrics["losses/value_loss"] == report.losses["value_loss"]
        assert found.point.shape == (0,)
        state = load_file(tmp_path / "run" / "cart-1" / f"round-{round:04d}.safetensors")
        np.testing.assert_array_equal(state["parameters"], learner.parameters[1].numpy())
        assert state["measurement_states"].shape == (48, 4)
        different = {tuple(row) for row in state["measurement_states"].tolist()}
        assert len(different) > 40, "states are sampled without replacement"
    clients.close()
    learner.close()


def test_environments_are_made_once_for_changing_clients(tmp_path: Path) -> None:
    """Four copies for each of three clients, to train and to evaluate on; compared with new ones in every round."""
    pid_file = tmp_path / "pid_file"
    text = CARTS.replace("grpo_fed/CartPole-v1", "tests.support.failing_envs:PidLogging-v0").split("spread")[0]
    given = scenario(clients=f"{text}kwargs = {{ pid_file = {str(pid_file)!r} }}\n")
    clients = make_clients(given, tmp_path / "cached")
    pid_file.unlink(missing_ok=True)
    sampled = (NAMES[:2], NAMES[1:], NAMES[::2], NAMES[:1])
    shared = [random_shared(round, clients.shared_blocks.size) for round in range(5)]
    found = [train_all(clients, round, shared[round], names) for round, names in enumerate(sampled, 1)]
    assert len(pid_file.read_text().split()) == 2 * 3 * 4
    for round, names in enumerate(sampled, 1):
        fresh = make_clients(given, tmp_path / "fresh")
        assert_the_same_bits(train_all(fresh, round, shared[round], names), found[round - 1])
        fresh.close()
    clients.close()


STILL = ("objective.learning_rate=1e-20",)


def test_shared_blocks_replace_all_groups_but_departed_ones(tmp_path: Path) -> None:
    """The learning rate is 0 in effect. A client without a state takes all shared blocks."""
    given = scenario(*STILL)
    clients = make_clients(given, tmp_path)
    one, two, three = (random_shared(round, clients.shared_blocks.size) for round in (1, 2, 3))
    found = train_all(clients, 1, one, NAMES[:2], departed=(1,))
    np.testing.assert_allclose(found["cart-0"].point, one, rtol=0, atol=1e-12)
    second = train_all(clients, 2, two, NAMES, departed=(1,))
    departed = clients.shared_blocks.columns_of_groups((1,)).numpy()
    assert 0 < departed.sum() < departed.size
    np.testing.assert_allclose(second["cart-0"].point, np.where(departed, one, two), rtol=0, atol=1e-12)
    np.testing.assert_allclose(second["cart-2"].point, two, rtol=0, atol=1e-12)
    np.testing.assert_allclose(train_all(clients, 3, three)["cart-0"].point, three, rtol=0, atol=1e-12)
    clients.close()


def test_private_blocks_begin_with_the_clients_first_parameters(tmp_path: Path) -> None:
    given = scenario(*STILL)
    clients = make_clients(given, tmp_path)
    train_all(clients, 1, random_shared(1, clients.shared_blocks.size))
    first = make_policy(clients.tasks["cart-0"], given.policy).initial(given.seed)
    private = torch.ones(len(first), dtype=torch.bool).index_fill_(0, clients.columns, False)
    assert private.sum() > 100
    state = states(tmp_path, 1)["cart-0"]["parameters"]
    np.testing.assert_allclose(state[private.numpy()], first[private].numpy(), rtol=0, atol=1e-12)
    clients.close()


def independent_kl(clients: Clients, client: str, folder: Path, round: int, old: np.ndarray, new: np.ndarray) -> float:
    """The KL by torch.distributions, from the client's file alone."""
    state = load_file(folder / "run" / client / f"round-{round:04d}.safetensors")
    policy = make_policy(clients.tasks[client], clients.scenario.policy)
    views, columns = policy.layout.views, clients.columns

    def acts(shared: np.ndarray) -> torch.distributions.Categorical:
        parameters = torch.from_numpy(state["parameters"]).clone()
        parameters[columns] = torch.from_numpy(shared)
        logits = policy.act(views(parameters[None]), torch.from_numpy(state["measurement_states"])[None])[0]
        return torch.distributions.Categorical(logits=logits.double())

    return float(torch.distributions.kl_divergence(acts(old), acts(new)).mean())


def test_a_client_measures_the_kl_on_its_own_states(tmp_path: Path) -> None:
    given = scenario("normalise.observations=true")
    clients = make_clients(given, tmp_path)
    shared_blocks = clients.shared_blocks
    begin, candidate = (random_shared(round, shared_blocks.size) for round in (1, 2))
    found = train_all(clients, 1, begin)
    fractions = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.5), (0.25, 0.0, 0.0), (0.0, 0.0, 0.0))
    instructions: dict[str, Measure] = {
        name: Measure(Start("run", 1, begin, (2,) if name == "cart-0" else ()), candidate, fractions) for name in NAMES
    }
    kl = answer_all(clients, instructions, Measured)
    for name in NAMES:
        departed = shared_blocks.columns_of_groups(instructions[name].start.departed).numpy()
        own = np.where(departed, found[name].point, begin)
        for fraction, measured in zip(fractions, kl[name].kl, strict=True):
            step = np.zeros_like(begin)
            for alpha, columns in zip(fraction, shared_blocks.slices.values(), strict=True):
                step[columns] = alpha * (candidate - begin)[columns]
            moved = np.where(departed, own, begin + step)
            expected = independent_kl(clients, name, tmp_path, 1, own, moved)
            assert measured == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert kl[name].kl[3] == 0.0
        assert kl[name].kl[0] > 1e-3
    assert kl["cart-0"].kl[1] == 0.0, "a departed group does not move"
    few = answer_all(make_clients(given, tmp_path, "cart-1"), {"cart-1": instructions["cart-1"]}, Measured)
    assert few["cart-1"].kl == pytest.approx(kl["cart-1"].kl, rel=1e-3, abs=1e-7)
    clients.close()


def test_an_infinite_kl_is_reported_as_the_largest_number(tmp_path: Path) -> None:
    """The candidate's logits overflow."""
    clients = make_clients(scenario(), tmp_path)
    begin = random_shared(1, clients.shared_blocks.size)
    train_all(clients, 1, begin)
    candidate = np.full_like(begin, 1e38)
    instructions = dict.fromkeys(NAMES, Measure(Start("run", 1, begin), candidate, ((1.0, 1.0, 1.0),)))
    for found in answer_all(clients, instructions, Measured).values():
        assert found.kl[0] > 1e30
        assert np.isfinite(found.kl[0])
    clients.close()


def test_a_client_measures_only_on_states_of_the_same_round(tmp_path: Path) -> None:
    clients = make_clients(scenario(), tmp_path)
    begin = random_shared(1, clients.shared_blocks.size)
    train_all(clients, 1, begin)
    instructions = {"cart-1": Measure(Start("run", 2, begin), begin, ((1.0, 1.0, 1.0),))}
    with pytest.raises(ValueError, match=r"client cart-1: it has no states of round 2.*trained that round of run"):
        clients.answer(instructions)


def test_the_last_step_is_measured_only_after_the_round_before(tmp_path: Path) -> None:
    """The KL is what `Measure` gives for the same step, jointly and for each block alone."""
    clients = make_clients(scenario(), tmp_path)
    one, two, three = (random_shared(round, clients.shared_blocks.size) for round in (1, 2, 3))
    assert train_all(clients, 1, one)["cart-0"].kl is None
    fractions = ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    instructions = dict.fromkeys(NAMES, Measure(Start("run", 1, one, (1,)), two, fractions))
    expected = answer_all(clients, instructions, Measured)
    found = train_all(clients, 2, two, NAMES[:2], departed=(1,))
    assert found["cart-0"].kl == pytest.approx(expected["cart-0"].kl, rel=1e-5)
    assert expected["cart-0"].kl[2] == 0.0
    last = train_all(clients, 3, three)
    assert last["cart-1"].kl is not None
    assert last["cart-2"].kl is None, "it did not take part in round 2"
    assert last["cart-2"].gain == 0.0
    clients.close()


def test_a_client_measures_and_evaluates_only_on_request(tmp_path: Path) -> None:
    clients = make_clients(scenario(), tmp_path)
    begin = random_shared(1, clients.shared_blocks.size)
    for round in (1, 2):
        instructions = dict.fromkeys(NAMES, Train(Start("run", round, begin), 0.0, 0.5))
        found = answer_all(clients, instructions, Trained)["cart-0"]
        assert (found.kl, found.evaluation, found.fisher) == (None, None, None)
    clients.close()


@pytest.mark.parametrize("overrides", [("normalise.observations=true",), METHODS["ditto"]], ids=["grpo", "ditto"])
def test_evaluation_uses_the_saved_policy_and_changes_nothing(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    given = scenario(*overrides)
    watched, unseen = make_clients(given, tmp_path / "a"), make_clients(given, tmp_path / "b")
    one, two, three = (random_shared(round, watched.shared_blocks.size) for round in (1, 2, 3))
    instructions = dict.fromkeys(NAMES, Evaluate(Start("run", 0, one), EvaluationPlan(0)))
    before = answer_all(watched, instructions, Evaluated)
    assert as_dict(before["cart-0"].summary) == as_dict(train_all(watched, 1, one)["cart-0"].evaluation)
    train_all(unseen, 1, one)
    start = Start("run", 1, two, (1,))
    played = answer_all(watched, dict.fromkeys(NAMES, Evaluate(start, EvaluationPlan(0))), Evaluated)
    run = tmp_path / "saved"
    run.mkdir()
    (run / SCENARIO).write_text(given.dumps())
    watched.save_policies(run, dict.fromkeys(NAMES, start), 1)
    for name in NAMES:
        scores = load_policy(run, name).play()
        every = scores.scores
        numbers = (every.mean(), every.std(), every.min(), every.max(), 4, scores.lengths.mean(), (), None)
        assert tuple(as_dict(played[name].summary).values()) == numbers
    number = answer_all(watched, {"cart-1": Evaluate(start, EvaluationPlan(1))}, Evaluated)["cart-1"]
    sampling = {"cart-1": Evaluate(start, EvaluationPlan(1, deterministic=False))}
    sampled = answer_all(watched, sampling, Evaluated)["cart-1"]
    again = train_all(watched, 2, two, departed=(1,))
    assert as_dict(number.summary) == as_dict(again["cart-1"].evaluation)
    assert as_dict(number.summary) != as_dict(sampled.summary)
    assert_the_same_bits(again, train_all(unseen, 2, two, departed=(1,)))
    assert_the_same_bits(train_all(watched, 3, three), train_all(unseen, 3, three))
    watched.close()
    unseen.close()


def test_a_client_that_missed_rounds_is_evaluated_with_its_latest_state(tmp_path: Path) -> None:
    clients = make_clients(scenario(), tmp_path)
    one, two = (random_shared(round, clients.shared_blocks.size) for round in (1, 2))
    train_all(clients, 1, one)
    train_all(clients, 2, two, NAMES[:1])
    late = answer_all(clients, {"cart-1": Evaluate(Start("run", 2, two), EvaluationPlan(2))}, Evaluated)["cart-1"]
    earlier = answer_all(clients, {"cart-1": Evaluate(Start("run", 1, two), EvaluationPlan(2))}, Evaluated)["cart-1"]
    assert as_dict(late.summary) == as_dict(earlier.summary)
    clients.close()


def test_a_long_refused_client_is_evaluated_with_its_earliest_state(tmp_path: Path) -> None:
    """The server has accepted its first round only, whose state it no longer has; its actor is private."""
    clients = make_clients(scenario('policy.shared=["torso.*"]', "normalise.observations=true"), tmp_path)
    one = random_shared(1, clients.shared_blocks.size)
    for round in (1, 2, 3, 4):
        train_all(clients, round, one)

    def evaluate(round: int) -> dict[str, float]:
        instructions = {"cart-1": Evaluate(Start("run", round, one), EvaluationPlan(4))}
        return as_dict(answer_all(clients, instructions, Evaluated)["cart-1"].summary)

    assert clients.state_store.read("run", "cart-1", 1) is None
    assert evaluate(1) == evaluate(2) != evaluate(0)
    clients.close()


class FailingEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises an error at the 40th step after a file was made, which is in the middle of a round."""

    steps = 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps = self.steps + 1 if BROKEN.exists() else 0
        if self.steps == 40:
            raise RuntimeError("the cart is broken")
        return self.env.step(action)


BROKEN = Path("never-there")
BREAKABLE = """
[[clients]]
name = "cart"
env = "CartPole-v1"
count = 2
[[clients]]
name = "weak"
env = "CartPole-v1"
wrappers = ["tests.federation.test_clients:FailingEnv"]
"""


def test_an_error_of_one_client_does_not_affect_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have learned from a batch by then; they go on from the beginning of the round, alone or all again."""
    monkeypatch.setattr("tests.federation.test_clients.BROKEN", tmp_path / "broken")
    given, names = scenario(clients=BREAKABLE), ("cart-0", "cart-1", "weak")
    clients, healthy = make_clients(given, tmp_path / "a"), make_clients(given, tmp_path / "b")
    one, two, three = (random_shared(round, clients.shared_blocks.size) for round in (1, 2, 3))
    for each in (clients, healthy):
        train_all(each, 1, one, names)
    (tmp_path / "broken").touch()
    with pytest.raises(Exception, match="the cart is broken"):
        clients.answer(dict.fromkeys(names, Train(Start("run", 2, two), 0.0, 0.5)))
    assert clients.state_store.latest("run", "cart-0") == 1
    for name in names[:2]:
        assert_the_same_bits(train_all(clients, 2, two, [name]), train_all(healthy, 2, two, [name]))
    (tmp_path / "broken").unlink()
    assert_the_same_bits(train_all(clients, 3, three, names), train_all(healthy, 3, three, names))
    (tmp_path / "broken").touch()
    with pytest.raises(Exception, match="the cart is broken"):
        clients.answer(dict.fromkeys(names, Train(Start("run", 4, three), 0.0, 0.5)))
    (tmp_path / "broken").unlink()
    assert_the_same_bits(train_all(clients, 4, three, names), train_all(healthy, 4, three, names))
    clients.close()
    healthy.close()


def test_a_client_without_its_files_begins_again(tmp_path: Path) -> None:
    clients, other = make_clients(scenario(), tmp_path / "a"), make_clients(scenario(), tmp_path / "b")
    one = random_shared(1, clients.shared_blocks.size)
    train_all(clients, 1, one)
    shutil.rmtree(tmp_path / "a" / "run" / "cart-1")
    assert_the_same_bits(train_all(clients, 2, one, ["cart-1"]), train_all(other, 2, one, ["cart-1"]))
    clients.close()
    other.close()


def test_runs_do_not_share_states(tmp_path: Path) -> None:
    clients = make_clients(scenario(), tmp_path)
    begin = random_shared(1, clients.shared_blocks.size)
    found = []
    for run in ("first", "second"):
        instructions = dict.fromkeys(NAMES, Train(Start(run, 1, begin), 0.0, 0.5))
        found.append(answer_all(clients, instructions, Trained))
    assert_the_same_bits(*found)
    clients.close()
