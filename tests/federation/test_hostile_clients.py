"""Clients that lie about their KL, their work, their Fisher matrix and their returns: no one of them has its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo_fed.aggregation.merge.averages import StreamingFisher
from grpo_fed.federation.messages import Answer, Evaluated, EvaluationSummary, Instruction, Measured, Trained
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.stopping import EarlyStopping
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.methods import ROBUST_RULES
from tests.support.numeric_clients import NumericTransport, numeric_federation, numeric_scenario

# KL ------------------------------------------------------------------------------------------------------------------


def lying_measure(transport: NumericTransport, liar: str, kl: float) -> None:
    """Let a client answer every question for a KL with the same number."""
    answer = transport._answer

    def lie(name: str, instruction: Instruction) -> Answer:
        honest = answer(name, instruction)
        if name == liar and isinstance(honest, Measured):
            return Measured((kl,) * len(honest.kl))
        return honest

    transport._answer = lie  # type: ignore[method-assign]


@pytest.mark.parametrize("kl", [1e300, 1.0, 3.4e38])
@pytest.mark.parametrize("rule", ["mean", "median", "trimmed-mean", "krum"])
def test_a_client_that_lies_about_its_kl_stops_nobody_and_is_named(rule: str, kl: float):
    settings = ("rounds=2", f'merge.rule="{rule}"', 'proximity.mode="measured"')
    alphas = []
    for lies in (False, True):
        scenario, shared_blocks, transport = numeric_federation(*settings, count=5)
        if lies:
            lying_measure(transport, "c-2", kl)
        records: list[RoundRecord] = []
        Federation(scenario, shared_blocks, transport).run(records.append)
        steps = [record.server.step for record in records if record.server is not None and record.server.step]
        alphas.append(np.array([step.alphas for step in steps]))
    assert (alphas[1] > 0.3 * alphas[0]).all()
    notes = [note for record in records if record.server is not None for note in record.server.notes]
    if rule == "mean" or kl > 1:  # a median bears a KL of 1 without a word
        assert any("c-2" in note and "KL" in note for note in notes)
    assert not any("c-0" in note and "KL" in note for note in notes)


def test_a_round_in_which_no_block_moves_has_a_note():
    scenario, shared_blocks, transport = numeric_federation("rounds=1", 'proximity.mode="measured"', count=2)
    lying_measure(transport, "c-1", 1e300)
    records: list[RoundRecord] = []
    Federation(scenario, shared_blocks, transport).run(records.append)
    server = records[-1].server
    assert server is not None
    assert server.step is not None
    assert max(server.step.alphas) == 0
    assert any(note.startswith("no block moved") for note in server.notes)


@pytest.mark.parametrize("rule", [*ROBUST_RULES, "mean"])
def test_robust_rules_use_the_median_kl_unless_it_is_given(rule: str):
    assert numeric_scenario(f'merge.rule="{rule}"').proximity.over == ("mean" if rule == "mean" else "median")
    assert numeric_scenario(f'merge.rule="{rule}"', 'proximity.over="worst"').proximity.over == "worst"
    assert numeric_scenario(f'merge.rule="{rule}"', "merge.mix=1").proximity.over == "median"


# Work, Fisher matrices and returns -----------------------------------------------------------------------------------


def lying(transport: NumericTransport, liar: str, change: Callable[[Answer], Answer]) -> None:
    """Let a client change every answer."""
    answer = transport._answer

    def lie(name: str, instruction: Instruction) -> Answer:
        honest = answer(name, instruction)
        return change(honest) if name == liar else honest

    transport._answer = lie  # type: ignore[method-assign]


def merged(*settings: str, change: Callable[[Answer], Answer] = lambda answer: answer) -> np.ndarray:
    """Merge a round of five clients, one of which may lie, and return how far its way the shared blocks went."""
    scenario, shared_blocks, transport = numeric_federation("rounds=1", *settings, count=5)
    lying(transport, "c-2", change)
    federation = Federation(scenario, shared_blocks, transport)
    federation.run()
    return federation.state.shared


def share_of_liar(*settings: str, change: Callable[[Answer], Answer]) -> float:
    """Compute the liar's part of a merge, from how far the merge is from the liar's point and that of the others."""

    def elsewhere(answer: Answer) -> Answer:
        answer = change(answer)
        return replace(answer, point=answer.point + 1) if isinstance(answer, Trained) else answer

    return float(np.mean(merged(*settings, change=elsewhere) - merged(*settings, change=change)))


def with_work(**claims: int) -> Callable[[Answer], Answer]:
    return lambda answer: replace(answer, **claims) if isinstance(answer, Trained) else answer


GROUPS = ('objective.preset="grpo"', "group.size=2", 'merge.weights="steps"')


def test_steps_beyond_those_asked_for_are_no_say_where_episodes_are_whole():
    assert share_of_liar(*GROUPS, change=with_work(steps=10**9)) == pytest.approx(1 / 5, rel=1e-5)


def test_equal_claims_have_equal_weights():
    scenario, shared_blocks, transport = numeric_federation("rounds=1", *GROUPS, count=5)
    transport.steps = dict.fromkeys(shared_blocks.clients, 300)
    more = Federation(scenario, shared_blocks, transport)
    more.run()
    assert (more.state.shared == merged(*GROUPS, 'merge.weights="uniform"')).all()


def test_episodes_count_ten_times_the_others_at_most():
    assert share_of_liar('merge.weights="episodes"', change=with_work(episodes=10**9)) == pytest.approx(
        10 / 14, rel=1e-3
    )


def test_honest_episodes_weigh_by_their_number():
    """The others have 5 each, and here the client tells the truth."""
    assert share_of_liar('merge.weights="episodes"', change=with_work(episodes=3)) == pytest.approx(3 / 23, rel=1e-3)


def with_fisher(scale: float) -> Callable[[Answer], Answer]:
    def change(answer: Answer) -> Answer:
        if not isinstance(answer, Trained) or answer.fisher is None:
            return answer
        return replace(answer, fisher=np.full_like(answer.fisher, scale))

    return change


def test_a_fisher_diagonal_of_any_scale_has_the_say_of_one_client():
    small, large = (share_of_liar('merge.rule="fisher"', change=with_fisher(scale)) for scale in (1.0, 3e38))
    assert large == pytest.approx(small, rel=1e-3)
    assert 0.1 < large < 0.5


def test_a_fisher_entry_counts_a_hundred_times_its_mean_at_most():
    merge = StreamingFisher()
    peak = torch.zeros(1000)
    peak[0] = 1e30
    merge.add(torch.ones(1000), 1.0, peak)
    merge.add(torch.zeros(1000), 1.0, torch.ones(1000))
    point = merge.result()
    assert point is not None
    assert float(point[0]) == pytest.approx(100 / 101)


QUADRATIC = ("rounds=1", 'proximity.mode="quadratic"')


def test_a_fisher_diagonal_cannot_hold_back_the_steps_of_all():
    alphas, notes = [], ()
    for change in (lambda answer: answer, with_fisher(3e38)):
        scenario, shared_blocks, transport = numeric_federation(*QUADRATIC, count=5)
        lying(transport, "c-2", change)
        records: list[RoundRecord] = []
        Federation(scenario, shared_blocks, transport).run(records.append)
        server = records[-1].server
        assert server is not None
        assert server.step is not None
        alphas.append(np.array(server.step.alphas))
        notes = server.notes
    assert (alphas[1] > 0.3 * alphas[0]).all()
    assert any("c-2" in note and "Fisher" in note for note in notes)


def claims_return(value: float) -> Callable[[Answer], Answer]:
    summary = EvaluationSummary(value, 0.0, value, value, 1, 1.0)

    def change(answer: Answer) -> Answer:
        if isinstance(answer, Evaluated):
            return Evaluated(summary)
        return replace(answer, evaluation=summary) if isinstance(answer, Trained) and answer.evaluation else answer

    return change


@pytest.mark.parametrize("delayed", [False, True])
def test_an_absurd_return_is_refused_and_its_client_named(delayed: bool):
    scenario, shared_blocks, transport = numeric_federation("rounds=2", "evaluate.every=1", count=4)
    lying(transport, "c-2", claims_return(1e99))
    records: list[RoundRecord] = []
    result = Federation(scenario, shared_blocks, transport, evaluate_with_next_round=delayed).run(records.append)
    assert all("c-2" not in record.scores and len(record.scores) == 3 for record in records)
    (_, kind, reason), *_ = result.missing["c-2"]
    assert (kind, "1e+99" in reason) == ("refused", True)
    assert set(result.missing) == {"c-2"}


def test_returns_of_another_scale_are_not_absurd():
    scenario, shared_blocks, transport = numeric_federation("rounds=1", count=4)
    lying(transport, "c-2", claims_return(-1e6))
    result = Federation(scenario, shared_blocks, transport).run()
    assert result.clients["c-2"].after == -1e6
    assert not result.missing


@pytest.mark.parametrize("claim", [1e99, 1e6, -1e6, math.inf])
def test_two_of_five_clients_do_not_end_a_run(claim: float):
    scenario, _, _ = numeric_federation("stop.target=20", "stop.patience=2", "evaluate.every=1")
    stopping, honest = EarlyStopping(), dict(zip("abc", (1.0, 2.0, 3.0), strict=True))
    for round in range(1, 6):
        scores: Mapping[str, float] = {name: value + round for name, value in honest.items()} | {"x": claim, "y": claim}
        stopping.observe(scenario, round, scores)
        assert not stopping.is_due
