"""Scales of returns: which are known, which runs have several, and what normalised scores are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from benchmarks.random_returns import EPISODES, play_randomly, play_scripted
from grpo_fed.callbacks import KeepBest, StopOnPlateau
from grpo_fed.callbacks.control import RunControl
from grpo_fed.federation.stopping import EarlyStopping
from grpo_fed.reports.comparison.verdicts import normalise_clients
from grpo_fed.reports.score_text import explain_scores, scores_text
from grpo_fed.reports.sweep.points import make_run, score_of
from grpo_fed.runs.history import History
from grpo_fed.runs.results import ClientResult, Result, mean_adaptation
from grpo_fed.runs.tracking.run_page import page_at_end, page_while_running
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.unused import GivenKeys
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.scores import KNOWN, ReturnScale, scales_of

BASE = """
name = "mixed"
rounds = 4
[evaluate]
every = 1
[[clients]]
name = "cart"
env = "CartPole-v1"
[[clients]]
name = "pole"
"""
KNOWN_MIX = BASE + 'env = "Pendulum-v1"\n'
UNKNOWN_MIX = BASE + 'env = "Acrobot-v1"\nwrappers = ["gymnasium.wrappers:FlattenObservation"]\n'


def test_a_score_is_0_for_random_actions_and_1_for_the_reference():
    scale = ReturnScale("X-v0", 20.0, 120.0)
    assert [scale.normalise(value) for value in (20.0, 120.0, 70.0, 145.0, -5.0)] == [0.0, 1.0, 0.5, 1.25, -0.25]


@pytest.mark.parametrize("env", ["CartPole-v1", "grpo_fed/Catch-v0"])
def test_the_table_has_what_random_actions_reach(env: str):
    assert round(float(np.mean(list(play_randomly(env, EPISODES)))), 2) == KNOWN[env][0]


def test_the_references_are_the_thresholds_or_those_of_scripted_policies():
    thresholds = {env: gymnasium.spec(env).reward_threshold for env in KNOWN}
    scripted = {env for env, threshold in thresholds.items() if threshold is None}
    assert scripted == {"Pendulum-v1", "grpo_fed/Pendulum-v1", "grpo_fed/PointMass-v0"}
    assert {env: KNOWN[env][1] for env in KNOWN.keys() - scripted} == {
        env: threshold for env, threshold in thresholds.items() if env not in scripted
    }
    returns = play_scripted("grpo_fed/PointMass-v0", 40)
    error = returns.std() / 40**0.5
    assert returns.mean() == pytest.approx(KNOWN["grpo_fed/PointMass-v0"][1], abs=4 * error)


def test_clients_of_one_environment_have_no_scales():
    text = KNOWN_MIX.replace("Pendulum-v1", "CartPole-v1")
    assert scales_of(Scenario.loads(text)) == {}
    score = "clients.0.score={random = 1.0, reference = 2.0}"
    alike = Scenario.loads(text, overrides=[score, score.replace(".0.", ".1.")])
    assert scales_of(alike) == {}


def test_unlike_environments_have_the_scales_of_the_table_or_those_that_are_given():
    scenario = Scenario.loads(KNOWN_MIX, overrides=["clients.1.score={random = -1500.0, reference = -100.0}"])
    assert scales_of(scenario) == {
        "cart": ReturnScale("CartPole-v1", 24.09, 475.0),
        "pole": ReturnScale("Pendulum-v1", -1500.0, -100.0),
    }
    two = KNOWN_MIX.replace("Pendulum-v1", "CartPole-v1")  # one environment with two scales is told apart by entries
    scales = scales_of(Scenario.loads(two, overrides=["clients.1.score={random = 0.0, reference = 9.0}"]))
    assert [scale.label for scale in scales.values()] == ["cart", "pole"]


def test_wrappers_may_change_rewards_so_the_table_is_not_used():
    assert not scales_of(Scenario.loads(UNKNOWN_MIX))["pole"].is_known


def test_completions_with_the_same_rewards_have_one_scale():
    rewards = 'rewards = [{ function = "exact" }]'
    text = 'name = "words"\n[objective]\npreset = "grpo"\n'
    text += "".join(f'[[clients]]\nname = "{name}"\nprompts = "m:{name}"\n{rewards}\n' for name in "ab")
    assert scales_of(Scenario.loads(text)) == {}
    unlike = scales_of(Scenario.loads(text, overrides=['clients.1.rewards=[{ function = "length" }]']))
    assert [scale.label for scale in unlike.values()] == ["rewards 1 exact", "rewards 1 length"]


def test_a_reference_must_be_above_random():
    with pytest.raises(ValueError, match=r"clients.pole.score.reference: must be above random = 5"):
        Scenario.loads(KNOWN_MIX, overrides=["clients.1.score={random = 5.0, reference = 1.0}"])


def test_a_score_has_no_effect_where_all_clients_have_one_environment(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(KNOWN_MIX.replace("Pendulum-v1", "CartPole-v1") + "score = { random = 1.0, reference = 2.0 }\n")
    scenario = Scenario.load(path, ["clients.0.score={random = 1.0, reference = 2.0}"])
    lines = GivenKeys.read(path, ["clients.0.score={random = 1.0, reference = 2.0}"]).unused_lines(scenario)
    assert any("score" in line and "all clients have one environment" in line for line in lines)


def result_of(scenario: Scenario, returns: dict[str, float]) -> Result:
    """Make the results of a run from the last returns."""
    scales = scales_of(scenario)
    clients = {
        entry.name: ClientResult(entry.task, 0.0, returns[entry.name], None, None, 1, 64, scale=scales[entry.name])
        for entry in scenario.clients
    }
    return Result("mixed", 0, "cpu", "finished", None, 4, 1.0, 128, clients, None)


def test_results_name_what_they_average():
    scenario = Scenario.loads(KNOWN_MIX)
    # the cart is half of the way from 24.09 to 475, the pole at the return of random actions
    result = result_of(scenario, {"cart": 249.545, "pole": -1239.56})
    document = result.to_json()
    assert (result.score_iqm, result.score_mean, document["eval"]["score_min"]) == (None, None, None)
    assert document["eval"]["normalised_mean"] == pytest.approx(0.25)
    assert document["eval"]["normalised_min"] == 0.0
    assert document["eval"]["by_environment"]["Pendulum-v1"]["mean"] == -1239.56
    assert Result.from_json(document) == result
    assert score_of(document) == pytest.approx(0.25)
    text = scores_text(document["eval"], is_single=False)
    assert text == "normalised score 0.25 (interquartile mean 0.25, worst 0.00; 0 is random, 1 the reference)"
    assert min(result.clients, key=lambda name: result.clients[name].rank) == "pole"
    begin = {"params": {"rounds": 4, "method": "grpo", "seed": 0}, "clients": ["cart", "pole"], "scenario": "mixed"}
    page = page_at_end({**begin, "description": ""}, document, "finished")
    assert "**Normalised score 0.25** (interquartile mean of 2 clients; mean 0.25, worst client 0.00;" in page
    assert "Mean return by environment: CartPole-v1 249.5; Pendulum-v1 -1239.6." in page
    line = {"round": 1, "eval/score_iqm": None, "eval/normalised_iqm": 0.25, "clients": {}}
    assert "normalised score **0.25**" in page_while_running(begin, line)


def test_returns_without_scales_are_given_by_environment():
    scenario = Scenario.loads(UNKNOWN_MIX)
    document = result_of(scenario, {"cart": 400.0, "pole": -90.0}).to_json()
    assert document["eval"]["normalised_iqm"] is None
    assert (
        scores_text(document["eval"], is_single=False) == "return by environment: CartPole-v1 400.0, Acrobot-v1 -90.0"
    )
    (sentence,) = explain_scores(scenario)
    assert "no scale is known for pole: give each score = { random = ..., reference = ... }" in sentence


def test_adaptation_has_no_mean_over_unlike_environments():
    result = result_of(Scenario.loads(KNOWN_MIX), {"cart": 1.0, "pole": 2.0})
    clients = {name: dataclasses.replace(client, adapted_last=(1.0, 2.0)) for name, client in result.clients.items()}
    document = dataclasses.replace(result, clients=clients).to_json()
    assert mean_adaptation(document) == (2, ())
    for client in document["clients"].values():
        del client["scale"]
    assert mean_adaptation(document) == (2, (1.0, 2.0))


def test_methods_are_compared_by_normalised_scores():
    history = History(Path("none"), Scenario.loads(KNOWN_MIX), (), None)
    returns = np.array([[249.545, -1239.56], [475.0, -152.25]])  # [S, K]
    np.testing.assert_allclose(normalise_clients(history, returns), [[0.5, 0.0], [1.0, 1.0]], atol=1e-12)
    poles = normalise_clients(history, returns[:, [1]], np.array([False, True]))
    np.testing.assert_allclose(poles, [[0.0], [1.0]], atol=1e-12)
    assert normalise_clients(History(Path("none"), Scenario.loads(UNKNOWN_MIX), (), None), returns) is None
    alike = Scenario.loads(KNOWN_MIX.replace("Pendulum-v1", "CartPole-v1"))
    assert normalise_clients(History(Path("none"), alike, (), None), returns) is returns


def test_a_sweep_needs_a_score_to_rank_by(tmp_path: Path):
    path = tmp_path / "mix.toml"
    path.write_text(UNKNOWN_MIX)
    with pytest.raises(ValueError, match=r"a sweep ranks runs by one number: .* no scale is known for pole"):
        make_run(path, [], [], None, tmp_path / "sweep", "--grid")


def test_a_run_ends_early_by_the_median_of_normalised_scores():
    scenario = Scenario.loads(KNOWN_MIX, overrides=["stop.target=0.5"])
    stopping = EarlyStopping()
    stopping.observe(scenario, 1, {"cart": 249.545, "pole": -1239.56})  # 0.5 and 0, whose median is 0.25
    assert stopping.best == (1, pytest.approx(0.25))
    assert not stopping.is_due
    stopping.observe(scenario, 2, {"cart": 475.0, "pole": -152.25})
    assert stopping.is_due


def test_a_median_of_unlike_returns_is_refused_before_the_run():
    scenario = Scenario.loads(UNKNOWN_MIX, overrides=["stop.target=100.0"])
    with pytest.raises(ValueError, match=r"stop.target = 100: .* no scale is known for pole"):
        resolve_tasks(scenario)


@pytest.mark.parametrize(
    ("callback", "metric"),
    [(KeepBest(), "eval/normalised_iqm"), (StopOnPlateau(patience=1), "charts/normalised_return")],
)
def test_callbacks_watch_normalised_scores_where_environments_are_unlike(tmp_path, callback, metric: str):
    callback.on_run_start(RunControl(Scenario.loads(KNOWN_MIX), tmp_path, dict, lambda folder: {}))
    assert callback.metric == metric


@pytest.mark.parametrize(
    ("text", "metric", "error"),
    [
        (KNOWN_MIX, "eval/score_iqm", "averages returns, and environments are unlike; watch eval/normalised_iqm"),
        (UNKNOWN_MIX, "eval/normalised_iqm", "no scale is known for pole"),
        (KNOWN_MIX.replace("Pendulum-v1", "CartPole-v1"), "eval/normalised_min", "watch eval/score_min"),
    ],
)
def test_a_metric_that_the_run_does_not_have_is_refused(text: str, metric: str, error: str):
    with pytest.raises(ValueError, match=error):
        StopOnPlateau(metric, patience=1).on_run_start(RunControl(Scenario.loads(text), None, dict))
