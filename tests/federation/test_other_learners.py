"""Clients whose learner is no stacked one: the federation needs nothing but the interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_fed.federation import clients as clients_module
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Evaluate, Evaluated, EvaluationPlan, Measure, Measured, Start, Train, Trained
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.folder import SCENARIO
from grpo_fed.runs.policies import load_policy
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks
from tests.support.text_learner import TextPolicies

NAMES = ("writer-0", "writer-1")
TEXT = """
name = "text"
rounds = 3
steps = 64
policy = { hidden = [4], shared = ["torso.*"] }
rollout = { num_envs = 2, horizon = 16 }
objective = { minibatches = 1 }
proximity.mode = "quadratic"
[[clients]]
name = "writer"
env = "grpo_fed/CartPole-v1"
count = 2
"""


@pytest.fixture(autouse=True)
def text_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module, "make_client_policies", TextPolicies)


def make_clients(folder: Path, *overrides: str) -> Clients:
    scenario = Scenario.loads(TEXT, overrides=overrides)
    store = StateStore(folder, durable=False)
    return Clients(scenario, resolve_shared_blocks(scenario), resolve_tasks(scenario), store)


def train_all(clients: Clients, round: int, shared: np.ndarray) -> dict[str, Trained]:
    start, plan = Start("run", round, shared), EvaluationPlan(round - 1)
    instruction = Train(start, 0.0, 1.0, measure_last_step=True, evaluate_first=plan)
    answers = clients.answer(dict.fromkeys(NAMES, instruction))
    return {name: answer for name, answer in answers.items() if isinstance(answer, Trained)}


@pytest.mark.parametrize("overrides", [(), ("method=ditto", "proximity.mode=quadratic")], ids=["shared", "ditto"])
def test_another_process_goes_on_with_text_learners_bit_for_bit(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    one, shared = make_clients(tmp_path / "one", *overrides), np.float32(0.1)
    points = []
    for round in (1, 2, 3):
        begin = np.full(one.shared_blocks.size, round * shared)
        expected = train_all(one, round, begin)
        found = train_all(make_clients(tmp_path / "many", *overrides), round, begin)
        for name in NAMES:
            assert found[name].point.tobytes() == expected[name].point.tobytes()
            assert found[name].kl == expected[name].kl
            assert (found[name].kl is None) == (round == 1)
            assert found[name].evaluation is not None
            assert found[name].fisher is not None
        points.append(expected[NAMES[0]].point)
    assert not np.array_equal(points[0], points[1])


def test_text_learners_measure_the_kl_on_their_own_completions(tmp_path: Path) -> None:
    clients = make_clients(tmp_path)
    begin = np.zeros(clients.shared_blocks.size, np.float32)
    candidate = np.linspace(-1, 1, len(begin), dtype=np.float32)
    train_all(clients, 1, begin)
    blocks = len(clients.shared_blocks.blocks)
    instruction = Measure(Start("run", 1, begin), candidate, (tuple([1.0] * blocks), tuple([0.0] * blocks)))
    answers = clients.answer(dict.fromkeys(NAMES, instruction))
    assert isinstance(clients.policies, TextPolicies)
    for name in NAMES:
        stored, answer = clients.state_store.read("run", name, 1), answers[name]
        assert stored is not None
        assert isinstance(answer, Measured)
        old, new = (torch.tensor(stored.arrays["adapter"]) for _ in range(2))
        old[clients.columns], new[clients.columns] = torch.from_numpy(begin), torch.from_numpy(candidate)
        logs = [(clients.policies.base + adapter).double().log_softmax(0) for adapter in (old, new)]
        tokens = stored.arrays["completions"]
        assert answer.kl[0] == pytest.approx(float((logs[0] - logs[1])[tokens].mean()), rel=1e-4, abs=1e-6)
        assert answer.kl[1] == 0.0


def test_policies_of_text_learners_are_evaluated_and_saved(tmp_path: Path) -> None:
    clients = make_clients(tmp_path)
    begin = np.zeros(clients.shared_blocks.size, np.float32)
    trained = train_all(clients, 1, begin)[NAMES[0]]
    start = Start("run", 1, trained.point)
    after = clients.answer({NAMES[0]: Evaluate(start, EvaluationPlan(1))})[NAMES[0]]
    assert isinstance(after, Evaluated)
    assert trained.evaluation is not None
    assert after.summary.mean > trained.evaluation.mean
    (tmp_path / SCENARIO).write_text(clients.scenario.dumps())
    clients.save_policies(tmp_path, {NAMES[0]: start}, 1)
    saved = load_policy(tmp_path, NAMES[0]).parameters[0]
    stored = clients.state_store.read("run", NAMES[0], 1)
    assert stored is not None
    assert torch.equal(saved, torch.tensor(stored.arrays["adapter"]))
