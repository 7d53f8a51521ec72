"""Twins: they learn alone, change nothing for the others, and tell each client whether sharing pays."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import grpo_fed
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.learners import RoundReports
from grpo_fed.federation.messages import Start, Train, Trained
from grpo_fed.federation.state_store import StateStore
from grpo_fed.federation.twins import ERROR, MARGIN, STAKES, TwinComparison, compare_with_twin, log_capital
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.records import Episode, TrainingReport
from grpo_fed.rl.rng import client_seed
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.continuation import prepare_continuation
from grpo_fed.runs.history import read_history
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_gym_tasks, resolve_tasks
from tests.support.real_clients import run
from tests.support.small_language import words

TEXT = """
name = "carts"
method = "fedavg"
rounds = 3
steps = 64
seed = 3
device = "cpu"
policy = { hidden = [8] }
rollout = { num_envs = 2, horizon = 32 }
objective = { epochs = 2, minibatches = 2, learning_rate = 0.02 }
evaluate = { episodes = 2 }
[[clients]]
name = "cart"
count = 2
env = "grpo_fed/CartPole-v1"
"""
NAMES = ("cart-0", "cart-1")
TWINS = "evaluate.twins=true"


def scenario(*overrides: str) -> Scenario:
    return Scenario.loads(TEXT, overrides=overrides)


def train(given: Scenario, folder: Path, round: int, sent: np.ndarray) -> dict[str, Trained]:
    """Train a round with clients that have just been made, as after a restart."""
    clients = Clients(given, resolve_shared_blocks(given), resolve_tasks(given), StateStore(folder, durable=False))
    instruction = Train(Start("run", round, sent), (round - 1) / 3, round / 3)
    answers = clients.answer(dict.fromkeys(clients.names, instruction))
    clients.close()
    return {name: answer for name, answer in answers.items() if isinstance(answer, Trained)}


def sent_in(round: int, given: Scenario) -> np.ndarray:
    """The shared blocks of a round: the first ones, then random ones, which no twin should see."""
    initial = resolve_shared_blocks(given).initial.numpy()
    return initial if round == 1 else np.random.default_rng(round).normal(0, 0.3, initial.size).astype(np.float32)


def report(*scores: float, floor: float = math.nan) -> TrainingReport:
    return TrainingReport("cart", 64, tuple(Episode(score, 9, True) for score in scores), {}, floor=floor)


# A twin learns alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sharing",
    [(), ("penalty.squared=5.0",), ("penalty.weight=0.5",), ("personal.first=0.5",), ("personal.inner_rate=0.1",)],
    ids=lambda overrides: overrides[0].partition("=")[0] if overrides else "plain",
)
def test_a_twin_is_a_client_that_learns_alone(sharing: tuple[str, ...], tmp_path: Path):
    """Whatever the server sends and the client adds for the sake of sharing; each round in another process."""
    given, plain = scenario(TWINS, *sharing), scenario()
    tasks = resolve_gym_tasks(plain)
    alone = StackedLearner(tasks, plain, [client_seed(3, f"{name} twin") for name in NAMES])
    columns = resolve_shared_blocks(given).columns_in(alone.policy.layout)
    first = StackedLearner(tasks, plain)
    alone.parameters.copy_(first.parameters)
    alone.parameters[:, columns] = torch.from_numpy(sent_in(1, given))
    for round in (1, 2, 3):
        train(given, tmp_path, round, sent_in(round, given))
        alone.train(64, (round - 1) / 3, round / 3)
        for row, name in enumerate(NAMES):
            state = load_file(tmp_path / "run" / name / f"round-{round:04d}.safetensors")
            np.testing.assert_array_equal(state["twin.parameters"], alone.parameters[row].numpy())
    first.close()
    alone.close()


def test_a_penalty_toward_zero_is_a_part_of_what_a_twin_minimises(tmp_path: Path):
    states = []
    for index, overrides in enumerate([("penalty.weight=0.5",), ()]):
        given = scenario(TWINS, "penalty.toward=zero", *overrides)
        train(given, tmp_path / str(index), 1, sent_in(1, given))
        states.append(load_file(tmp_path / str(index) / "run" / "cart-0" / "round-0001.safetensors"))
    assert not np.array_equal(*(state["twin.parameters"] for state in states))


@pytest.mark.parametrize("extra", [(), ("personal.model=true", "steps=128"), ("round.fraction=0.5",)], ids=str)
def test_twins_change_no_bit_of_the_federation(extra: tuple[str, ...], tmp_path: Path):
    transports = []
    for index, overrides in enumerate([(TWINS,), ()]):
        _, transport, _ = run(scenario(*extra, *overrides), tmp_path / str(index))
        transports.append(transport)
    assert len(transports[0].trained) == len(transports[1].trained) > 0
    for (name, round, with_twin), (*same, without) in zip(*(each.trained for each in transports), strict=True):
        assert [name, round] == same
        assert with_twin.point.tobytes() == without.point.tobytes()
        counts = [(answer.steps, answer.episodes, answer.gain, answer.spread) for answer in (with_twin, without)]
        assert counts[0] == counts[1]
        kept = {key: value for key, value in with_twin.metrics.items() if not key.startswith("twin/")}
        assert kept.keys() == without.metrics.keys()
        timed = {"charts/seconds"}
        assert all(kept[key] == value for key, value in without.metrics.items() if key not in timed)


def test_language_models_have_twins(tmp_path: Path):
    _, transport, _ = run(words(TWINS, "rounds=2"), tmp_path)
    assert {"twin/episodic_return", "twin/gain"} <= transport.trained[-1][2].metrics.keys()


# What it says, by hand ------------------------------------------------------------------------------------------------


def test_a_comparison_by_hand():
    """The first round has the lowest return, 10. Then g is (30 - 50) / 40 = -0.5 and (70 - 50) / 60 = 1/3."""
    compared = TwinComparison().after(1, report(10.0, 20.0), report(5.0, 15.0))
    assert (compared.lowest, compared.gains, compared.interval) == (10.0, (), (-1.0, 1.0))
    compared = compared.after(2, report(20.0, 40.0), report(50.0)).after(3, report(70.0), report(40.0, 60.0))
    assert compared.gains == pytest.approx((-0.5, 1 / 3))
    metrics = compared.metrics(report(40.0, 60.0))
    assert metrics["twin/gain"] == pytest.approx(-1 / 12)
    assert (metrics["twin/episodic_return"], metrics["twin/verdict"], metrics["twin/since"]) == (50.0, 0.0, 0.0)


def test_the_capital_by_hand():
    """Against a mean of -0.1, g = -1 and 0.5 multiply a stake of 1/2 by 1 + 0.45 / 1.1 and 1 - 0.3 / 1.1."""
    products = [(1 + f * 0.9 / 1.1) * (1 - f * 0.6 / 1.1) for f in (0.25, 0.5, 0.75, 0.95)]
    assert products[1] == pytest.approx((1 + 0.45 / 1.1) * (1 - 0.3 / 1.1))
    assert math.exp(log_capital(np.array([-1.0, 0.5]), -0.1)) == pytest.approx(sum(products) / 4)


def test_a_verdict_begins_where_the_capital_is_20():
    """With g = -1 in every round a stake f wins 0.9 f / 1.1 of itself, and the mean is above 20 from 7 rounds on."""
    capital = [sum((1 + f * 0.9 / 1.1) ** n for f in (0.25, 0.5, 0.75, 0.95)) / 4 for n in range(9)]
    assert capital[6] < 20 < capital[7]
    compared = TwinComparison().after(1, report(10.0), report(10.0))
    verdicts = []
    for round in range(2, 11):
        compared = compared.after(round, report(10.0), report(100.0))
        verdicts.append((compared.verdict, compared.since))
    assert verdicts == [(0, 0)] * 6 + [(-1, 8)] * 3
    for round in range(11, 80):
        compared = compared.after(round, report(100.0), report(10.0))
    assert (compared.verdict, compared.since > 11) == (1, True)


def test_the_ends_of_the_interval_are_just_not_refuted():
    gains = tuple(np.random.default_rng(1).uniform(-1, 0.6, 40))
    compared = TwinComparison(0.0, gains=gains)
    low, high = compared.interval
    assert -1 < low < compared.mean < high < 1
    assert math.exp(log_capital(np.array(gains), high)) == pytest.approx(1 / ERROR, rel=1e-4)
    assert math.exp(log_capital(-np.array(gains), -low)) == pytest.approx(1 / ERROR, rel=1e-4)


def test_rounds_without_finished_episodes_do_not_count():
    compared = TwinComparison().after(1, report(10.0), report(10.0))
    assert compared.after(2, report(), report(50.0)) == compared == compared.after(2, report(50.0), report())


def test_what_a_policy_that_can_do_nothing_returns_is_the_lowest():
    compared = TwinComparison().after(1, report(0.6, floor=0.0), report(0.4, floor=0.0))
    assert compared.after(2, report(0.5), report(1.0)).mean == pytest.approx(-0.5)


def test_the_comparison_is_of_the_policy_that_is_evaluated():
    empty = replace(report(), steps=0)
    first = compare_with_twin(None, 1, RoundReports(report(10.0), empty, report(10.0)))
    with_personal = compare_with_twin(first.arrays, 2, RoundReports(report(10.0), report(60.0), report(35.0)))
    assert with_personal.metrics["twin/gain"] == pytest.approx(0.5)
    assert compare_with_twin(None, 1, RoundReports(report(10.0), empty, None)).arrays == {}


def test_a_state_keeps_the_comparison():
    compared = TwinComparison(3.5, -1, 5, (-0.25, 0.5))
    assert TwinComparison.read(compared.arrays()) == compared
    assert TwinComparison.read(None) == TwinComparison.read({}) == TwinComparison()


@pytest.mark.parametrize("kind", ["signs", "uniform", "rare", "growing"])
def test_a_true_claim_is_seldom_refuted_in_any_round(kind: str):
    """Of 2,000 streams of g with a mean of -MARGIN, in 300 rounds each, at most 5 % ever raise a false alarm."""
    draws = np.random.default_rng(7).random((2000, 300))
    spread = {
        "signs": 0.9 * np.sign(draws - 0.5),
        "uniform": 1.8 * draws - 0.9,
        "rare": np.where(draws < 0.9, 0.1, -0.9),
        "growing": 0.9 * np.sign(draws - 0.5) * np.linspace(0, 1, 300),
    }[kind]
    assert abs(spread.mean()) < 0.01
    gains = (spread - MARGIN)[:, None, :]
    wins = np.log1p(-STAKES[:, None] * (gains + MARGIN) / (1 + MARGIN)).cumsum(axis=2)
    capital = np.exp(wins).mean(axis=1)
    assert 0 < (capital >= 1 / ERROR).any(axis=1).mean() <= ERROR
    assert math.exp(log_capital(gains[3, 0], -MARGIN)) == pytest.approx(capital[3, -1])


# What people see ------------------------------------------------------------------------------------------------------


def test_a_run_cannot_begin_with_twins_when_it_goes_on(tmp_path: Path):
    grpo_fed.run(scenario("rounds=1"), tmp_path / "run", workers=0)
    with pytest.raises(ValueError, match=r"evaluate\.twins = true: .* has false"):
        prepare_continuation(tmp_path / "run", [TWINS, "rounds=2"], tmp_path / "next")


def test_results_and_lines_have_the_verdicts(tmp_path: Path):
    grpo_fed.run(scenario(TWINS), tmp_path / "run", workers=0)
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    history = read_history(tmp_path / "run")
    for k, name in enumerate(NAMES):
        sharing = document["clients"][name]["sharing"]
        assert sharing["gain"] == history.client_series("twin/gain")[-1, k]
        assert (sharing["verdict"], sharing["since"]) == ("open", 0)
    assert "twin/since" not in history.lines[-1]
    assert history.lines[-1]["twin/gain"] == pytest.approx(history.client_series("twin/gain")[-1].mean())
