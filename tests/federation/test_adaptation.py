"""Adaptation in evaluations: a plain run from the shared policy, made on a copy, of clients that may be held out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from grpo_fed.engines.alone import train
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.wire import Codec, InvalidMessageError
from grpo_fed.federation.adaptation import adapted_returns
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Start,
    Train,
    Trained,
)
from grpo_fed.federation.participation import sample_clients, wait_for_clients
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.language.learner import LanguageLearner
from grpo_fed.rl.language.policies import LanguagePolicies
from grpo_fed.rl.stacked_policies import StackedPolicies
from grpo_fed.runs.continuation import prepare_continuation
from grpo_fed.runs.history import read_history
from grpo_fed.runs.metrics import is_timed
from grpo_fed.runs.policies import load_policy
from grpo_fed.runs.records import Failure, RoundRecord
from grpo_fed.runs.results import Result, mean_adaptation
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.resolve import resolve_tasks
from tests.support.real_clients import RealTransport
from tests.support.real_clients import run as run_here
from tests.support.small_language import words

UPDATES = 3
TEXT = f"""
name = "newcomers"
method = "fedavg"
rounds = 4
steps = 64
seed = 3
device = "cpu"
policy = {{ hidden = [8] }}
rollout = {{ num_envs = 2, horizon = 32 }}
objective = {{ epochs = 2, minibatches = 2, learning_rate = 0.02 }}
evaluate = {{ episodes = 3, step_limit = 60, adapt = {UPDATES}, every = 2 }}
checkpoint = {{ keep = 9 }}

[[clients]]
name = "cart"
count = 2
env = "grpo_fed/CartPole-v1"
"""
NEWCOMERS = """
[[clients]]
name = "new"
count = 2
env = "grpo_fed/CartPole-v1"
spread = { length = [0.2, 1.2] }
trains = false
"""
BUFFERED = ('round.mode="buffered"', "clients.0.pace=2.3", "round.buffer=0.5")


class Stopped(Exception):
    """Stops a run."""


def run(folder: Path, *overrides: str, text: str = TEXT + NEWCOMERS, stop: int | None = None) -> Result | None:
    """Run the scenario in this process; stop: the round after whose line it is stopped."""

    def watch(record: RoundRecord) -> None:
        if record.round == stop:
            raise Stopped

    with LocalEngine(Scenario.loads(text, overrides=list(overrides)), folder, workers=0) as engine:
        with contextlib.suppress(Stopped):
            engine.run(watch)
        return engine.result


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Read a run's lines without times and traffic, of the whole and of each client."""

    def kept(metrics: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in metrics.items() if not is_timed(key) and not key.startswith("comm/")}

    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [kept(line) | {"clients": {name: kept(each) for name, each in line["clients"].items()}} for line in lines]


def parameters_of(folder: Path, client: str) -> np.ndarray:
    """Read the policy that a run saved for a client, as one row."""
    return load_policy(folder, client).parameters.numpy().reshape(-1)


# What adaptation is --------------------------------------------------------------------------------------------------


def test_adaptation_is_a_plain_run_of_one_client_from_the_shared_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same client, trained by `train` from the saved policy on the adaptation's streams, has the same returns."""
    result = run(tmp_path / "federation")
    assert result is not None
    curve = result.clients["new-1"].adapted_last
    assert len(curve) == UPDATES + 1
    assert curve[0] == result.clients["new-1"].after
    assert len(set(curve)) > 1

    monkeypatch.setattr("grpo_fed.rl.stacked_learner.client_seed", lambda seed, name: adapted_seed(seed, name))
    start = f'policy.start="{tmp_path / "federation"}"'
    length = resolve_tasks(Scenario.loads(TEXT + NEWCOMERS))[-1].kwargs["length"]
    entry = f'[[clients]]\nname = "new-1"\nenv = "grpo_fed/CartPole-v1"\nkwargs = {{ length = {length} }}'
    for updates in range(1, UPDATES + 1):
        folder = tmp_path / f"alone-{updates}"
        scenario = Scenario.loads(TEXT + entry, overrides=[start, f"rounds={updates}", "evaluate.adapt=0"])
        train(scenario, folder)
        assert curve[updates] == played(scenario, folder)


def adapted_seed(seed: int, client: str) -> int:
    """The seed of a client's streams while it is adapted."""
    from grpo_fed.rl.rng import client_seed

    return client_seed(seed, f"{client} adapted")


def played(scenario: Scenario, folder: Path) -> float:
    """Play a saved policy in the episodes of the last evaluation of the federation."""
    tasks = [task for task in resolve_tasks(scenario) if task.client == "new-1"]
    policies = StackedPolicies(tasks, scenario, resolve_shared_blocks(scenario))
    parameters = torch.from_numpy(parameters_of(folder, "new-1"))[None]
    (evaluation,) = policies.evaluate(["new-1"], parameters, [None], 4, deterministic=True)
    policies.close()
    return float(np.mean(evaluation.scores))


def test_language_models_adapt_as_their_learner_trains():
    """The learner of these clients, trained for a batch after another, answers the evaluation's prompts as well."""
    scenario = words("method=fedavg", "evaluate.adapt=2", clients=("up", "back"))
    tasks = [task for task in resolve_tasks(scenario) if isinstance(task, LanguageTask)]
    names = [task.client for task in tasks]
    policies = LanguagePolicies(tasks, scenario, resolve_shared_blocks(scenario))
    begin = policies.parameters(names, [None, None])
    curves = adapted_returns(policies, names, begin, [None, None], 0, 2)
    learner = LanguageLearner(tasks, scenario, seeds=[adapted_seed(scenario.seed, name) for name in names])
    learner.parameters.copy_(begin)
    for update in range(2):
        learner.train(scenario.steps)
        evaluations = policies.evaluate(names, learner.parameters, [None, None], 0, deterministic=True)
        assert [curve[update] for curve in curves] == [evaluation.score for evaluation in evaluations]
    assert not torch.equal(learner.parameters, begin)
    policies.close()


def test_what_a_server_adds_to_updates_is_no_part_of_adaptation(tmp_path: Path):
    """Inner steps and corrected drift change what clients learn in a round, and not how they adapt."""
    curves = [
        run(tmp_path / f"{index}", "rounds=1", *changes)
        for index, changes in enumerate([(), ("personal.inner_rate=0.1",), ("merge.correct_drift=true",)])
    ]
    first = [{name: each.adapted_first for name, each in result.clients.items()} for result in curves if result]
    assert len(first) == 3
    assert first[0] == first[1] == first[2]
    assert len(set(first[0].values())) > 1


# What depends on it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ['method="grpo"', 'method="clusters"', BUFFERED[0]])
def test_adaptation_and_held_out_clients_change_nothing_of_the_others(tmp_path: Path, change: str):
    """The trained clients end with the same bits, with others held out and adapted, and without."""
    with_both = run(tmp_path / "both", change)
    without = run(tmp_path / "without", change, "evaluate.adapt=0", text=TEXT)
    assert with_both is not None
    assert without is not None
    for name in ("cart-0", "cart-1"):
        np.testing.assert_array_equal(parameters_of(tmp_path / "both", name), parameters_of(tmp_path / "without", name))
    for line, other in zip(lines_of(tmp_path / "both"), lines_of(tmp_path / "without"), strict=True):
        ours = {name: line["clients"][name] for name in other["clients"]}
        for metrics, plain in ((line, other), *((ours[name], other["clients"][name]) for name in ours)):
            assert {key: metrics[key] for key in plain if key != "clients"} == {
                key: value for key, value in plain.items() if key != "clients"
            }
    saved = "checkpoints/round-0004/shared.safetensors"
    checkpoints = [load_file(tmp_path / name / saved) for name in ("both", "without")]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    for name, array in checkpoints[0].items():  # also what the merge rule remembers of the clients
        np.testing.assert_array_equal(array, checkpoints[1][name], name)
    assert (with_both.score_iqm, with_both.score_min) == (without.score_iqm, without.score_min)
    assert with_both.env_steps == without.env_steps


def test_a_run_that_was_stopped_adapts_as_one_that_was_not(tmp_path: Path):
    whole = run(tmp_path / "whole", *BUFFERED)
    assert whole is not None
    run(tmp_path / "stopped", *BUFFERED, stop=2)
    with LocalEngine.resumed(tmp_path / "stopped") as engine:
        resumed = engine.run()
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
    assert resumed.clients == whole.clients


def test_evaluations_with_the_next_round_adapt_as_those_by_themselves(tmp_path: Path):
    """A transport whose messages cost seconds evaluates trained clients with their training, and the others then."""
    scenario = Scenario.loads(TEXT + NEWCOMERS, overrides=["rounds=3"])
    curves = []
    for delayed in (False, True):
        transport = RealTransport(scenario, tmp_path / f"states-{delayed}")
        federation, records = transport.federation(delayed), []
        federation.run(records.append)
        curves.append({record.round: {each.client: each.adapted for each in record.clients} for record in records})
        asked = [name for name, instruction in transport.sent if isinstance(instruction, Train)]
        assert set(asked) == {"cart-0", "cart-1"}
    assert curves[0] == curves[1]
    assert [len(curves[0][2][name]) for name in ("cart-0", "new-1")] == [UPDATES, UPDATES]


def test_a_held_out_client_of_a_second_personal_model_is_evaluated_with_the_shared_policy(tmp_path: Path):
    scenario = Scenario.loads(TEXT + NEWCOMERS, overrides=['method="ditto"', "steps=128"])
    _, transport, records = run_here(scenario, tmp_path)
    last = {each.client: each for each in records[-1].clients}
    start = next(i.start for name, i in reversed(transport.sent) if name == "new-0" and isinstance(i, Evaluate))
    policies = StackedPolicies(resolve_tasks(scenario), scenario, transport.shared_blocks)
    row = torch.from_numpy(np.array(start.shared))[None]
    (evaluation,) = policies.evaluate(["new-0"], row, [None], 4, deterministic=True)
    policies.close()
    assert last["new-0"].score == evaluation.score


def test_a_continued_run_may_adapt_by_another_number_of_updates(tmp_path: Path):
    run(tmp_path / "first")
    continued = tmp_path / "second"
    prepare_continuation(tmp_path / "first", ["rounds=5", "evaluate.adapt=1"], continued)
    with LocalEngine.resumed(continued) as engine:
        result = engine.run()
    assert len(result.clients["new-0"].adapted_last) == 2
    history = read_history(continued)
    assert history.adapted_last.shape == (4, 2)
    assert np.isfinite(history.adapted_last).all()
    assert np.isnan(history.adapted_first).all()  # those were of three updates


# Who takes part -------------------------------------------------------------------------------------------------------


def test_held_out_clients_are_neither_sampled_nor_counted():
    scenario = Scenario.loads(TEXT + NEWCOMERS)
    blocks = resolve_shared_blocks(scenario)
    assert (blocks.training_clients, blocks.held_out) == (("cart-0", "cart-1"), ("new-0", "new-1"))
    assert sample_clients(scenario, ("cart-1", "new-0", "new-1"), 1) == ["cart-1"]
    connected = iter([("new-0", "new-1"), ("cart-1", "new-0", "new-1")])
    assert wait_for_clients(lambda: next(connected), blocks.training_clients, 1, None) == (
        "cart-1",
        "new-0",
        "new-1",
    )


def test_somebody_has_to_train():
    with pytest.raises(ScenarioError, match=r"no client takes part in training; leave trains out of one entry"):
        Scenario.loads(TEXT + NEWCOMERS, overrides=["clients.0.trains=false"])


@pytest.mark.parametrize("overrides", [["evaluate.adapt=0"], ["clients.1.trains=true"]])
def test_clients_without_a_server_have_no_adaptation(tmp_path: Path, overrides: list[str]):
    with pytest.raises(ValueError, match=r"is for a federation; use grpo-fed run, with method = \"local\""):
        train(Scenario.loads(TEXT + NEWCOMERS, overrides=overrides), tmp_path)


# Messages and results -------------------------------------------------------------------------------------------------


def test_the_curve_of_an_adaptation_travels_and_is_checked():
    scenario = Scenario.loads(TEXT + NEWCOMERS)
    blocks = resolve_shared_blocks(scenario)
    codec, start = Codec(blocks, scenario), Start("run", 1, blocks.initial.numpy())
    instruction = Evaluate(start, EvaluationPlan(1))
    summary = EvaluationSummary(20.0, 3.0, 15.0, 26.0, 3, 20.0, (21.0, 22.5, 24.0))
    content = codec.write_answer(instruction, Evaluated(summary))
    answer = codec.read_answer(instruction, content)
    assert isinstance(answer, Evaluated)
    assert answer.summary.adapted == summary.adapted
    for wrong in ([1.0, 2.0], [1.0, 2.0, float("nan")], [1.0, 2.0, float("inf")], [1, 2, 3], [1.0, 2.0, 3.0, 4.0]):
        content = codec.write_answer(instruction, Evaluated(summary))
        content["evaluation"]["adapted"] = wrong
        with pytest.raises(InvalidMessageError, match=r"evaluation.adapted is .* it has to be 3 finite floats"):
            codec.read_answer(instruction, content)
    sampled = Evaluate(start, EvaluationPlan(1, deterministic=False))
    with pytest.raises(InvalidMessageError, match="adapted"):
        codec.read_answer(sampled, codec.write_answer(sampled, Evaluated(summary)))


def test_an_adaptation_of_no_scale_that_the_others_have_is_refused(tmp_path: Path):
    class Liar(RealTransport):
        def send(
            self, instructions: Mapping[str, Instruction], deadline: float | None
        ) -> Iterator[tuple[str, Answer | Failure]]:
            for name, answer in super().send(instructions, deadline):
                if name == "new-0" and isinstance(answer, Evaluated):
                    answer = Evaluated(replace(answer.summary, adapted=(1.0, 2.0, -1e30)))
                yield name, answer

    records: list[RoundRecord] = []
    Liar(Scenario.loads(TEXT + NEWCOMERS, overrides=["rounds=1"]), tmp_path).federation().run(records.append)
    last = {each.client: each for each in records[-1].clients}
    assert (last["new-0"].score, last["new-0"].adapted) == (None, ())
    failure = last["new-0"].failure
    assert failure is not None
    assert failure.reason.startswith("a mean return of -1e+30")
    assert len(last["new-1"].adapted) == UPDATES


def test_an_answer_to_training_has_the_adaptation_where_an_evaluation_rides_with_it():
    scenario = Scenario.loads(TEXT + NEWCOMERS)
    blocks = resolve_shared_blocks(scenario)
    codec, start = Codec(blocks, scenario), Start("run", 1, blocks.initial.numpy())
    summary = EvaluationSummary(20.0, 3.0, 15.0, 26.0, 3, 20.0, (21.0, 22.5, 24.0))
    train = Train(start, 0.0, 0.25, False, EvaluationPlan(0), ())
    trained = Trained(blocks.initial.numpy(), 64, 3, 0.0, 2.0, {}, evaluation=summary)
    answer = codec.read_answer(train, codec.write_answer(train, trained))
    assert isinstance(answer, Trained)
    assert answer.evaluation is not None
    assert answer.evaluation.adapted == summary.adapted


def test_the_mean_adaptation_is_of_held_out_clients_or_else_of_all():
    curves = {"a": [10.0, 30.0], "b": [1.0, 5.0], "c": [3.0, 9.0]}
    clients = {name: {"adapted_last": curve, "trains": name == "a"} for name, curve in curves.items()}
    assert mean_adaptation({"clients": clients}) == (2, (2.0, 7.0))
    assert mean_adaptation({"clients": {"a": clients["a"]}}) == (1, (10.0, 30.0))
    assert mean_adaptation({"clients": clients}, last=False) == (0, ())
