"""Metrics that stay with their clients: what still leaves, a run without returns, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo_fed.engines.wire import Codec, InvalidMessageError
from grpo_fed.federation.messages import (
    Answer,
    Evaluated,
    EvaluationSummary,
    Instruction,
    Train,
    Trained,
)
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.withheld_metrics import NOT_PLAYED, withhold_metrics
from grpo_fed.reports.explain import explain_scenario
from grpo_fed.reports.summary import write_summary
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.source import ScenarioError
from tests.support.numeric_clients import numeric_scenario
from tests.support.real_clients import RealTransport
from tests.support.small_federation import TINY

WITHHELD = ("privacy.metrics=withheld", "method=fedavg")


class CapturingTransport(RealTransport):
    """Clients in this process, whose answers are written down."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.answers: list[Answer] = []

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        codec = Codec(self.shared_blocks, self.scenario)
        for name, answer in super().send(instructions, deadline):
            assert not isinstance(answer, Failure)
            content = codec.write_answer(instructions[name], answer)
            self.answers.append(codec.read_answer(instructions[name], content))
            yield name, self.answers[-1]


def run(folder: Path, *overrides: str) -> tuple[list[Answer], np.ndarray]:
    transport = CapturingTransport(Scenario.loads(TINY, overrides=overrides), folder / "clients")
    scenario, shared_blocks = transport.scenario, transport.shared_blocks
    federation = Federation(scenario, shared_blocks, transport, folder / "run", evaluate_with_next_round=True)
    federation.run()
    for clients in transport.clients.values():
        clients.close()
    return transport.answers, federation.state.shared


def test_clients_learn_the_same_and_report_nothing(tmp_path: Path):
    answers, shared = run(tmp_path / "withheld", *WITHHELD, "evaluate.every=1")
    told, same = run(tmp_path / "told", "method=fedavg")
    np.testing.assert_array_equal(shared, same)
    trained = [answer for answer in answers if isinstance(answer, Trained)]
    evaluated = [answer for answer in answers if isinstance(answer, Evaluated)]
    assert len(trained) == len([answer for answer in told if isinstance(answer, Trained)])
    for answer in trained:
        assert (answer.metrics, answer.episodes, answer.gain, answer.spread) == ({}, 0, 0.0, 0.0)
        assert (answer.low, answer.evaluation, answer.comparison, answer.evidence) == (False, None, None, ())
    assert {answer.summary.episodes for answer in evaluated} == {0}
    folder = tmp_path / "withheld" / "run"
    for line in map(json.loads, (folder / "rounds.jsonl").read_text().splitlines()):
        told_of = {name for name, value in line.items() if name.startswith(("losses/", "eval/", "charts/")) and value}
        assert told_of <= {"charts/SPS"}
    results = json.loads((folder / "results.json").read_text())
    assert results["eval"] == {"score_iqm": None, "score_mean": None, "score_min": None}
    assert results["status"] == "finished"
    write_summary(folder)
    assert "nan" not in (folder / "summary.md").read_text().lower()


def test_steps_of_whole_episodes_are_the_scenarios():
    scenario = numeric_scenario(*WITHHELD, "objective.preset=grpo", "group.size=2")
    trained = Trained(np.zeros(3, np.float32), 517, 9, 0.5, 2.0, {"losses/entropy": 1.0}, low=True)
    summary = EvaluationSummary(5.0, 1.0, 4.0, 6.0, 3, 9.0)
    answers = withhold_metrics(scenario, {"a": replace(trained, evaluation=summary), "b": Evaluated(summary)})
    first, second = answers.values()
    assert isinstance(first, Trained)
    assert (first.steps, first.episodes, first.evaluation) == (128, 0, None)
    assert isinstance(second, Evaluated)
    assert second.summary is NOT_PLAYED
    others = numeric_scenario("method=fedavg")
    assert withhold_metrics(others, {"a": trained})["a"] is trained


def test_the_server_refuses_metrics_that_should_have_stayed(tmp_path: Path):
    transport = RealTransport(Scenario.loads(TINY, overrides=WITHHELD), tmp_path)
    codec = Codec(transport.shared_blocks, transport.scenario)
    federation = transport.federation()
    start = federation.server.state_of(transport.shared_blocks.clients[0]).start("cart", 1)
    trained = Trained(start.shared, 8, 0, 0.0, 0.0, {"losses/entropy": 0.5})
    train = Train(start, 0.0, 0.5)
    with pytest.raises(InvalidMessageError, match="metrics has 1 numbers; at most 0 are allowed"):
        codec.read_answer(train, codec.write_answer(train, trained))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("stop.target=9", "evaluate.every=1"), "no return says when to stop"),
        (("stop.patience=2", "evaluate.every=1"), "no return says when to stop"),
        (("merge.rule=persistence",), 'use merge.confirm = "evidence" and merge.rejoin = 0'),
        (("merge.weights=progress",), 'merge.weights = "progress" goes by what clients report'),
        (("merge.weights=episodes",), 'merge.weights = "episodes" goes by what clients report'),
        (("proximity.mode=measured", "proximity.adaptive=true"), "budgets would follow gains of returns"),
        (("sites=[{ name = 'all', clients = ['*'] }]",), "sites compare by returns"),
        (("evaluate.twins=true",), "twins would be compared by returns"),
        (
            (
                "clients.c.curriculum={ kind = 'return', ranges = { length = [0.1, 0.9] }, target = 9 }",
                "curriculum.by=server",
            ),
            "the server would steer levels by returns",
        ),
    ],
)
def test_what_depends_on_metrics_is_refused(overrides: tuple[str, ...], words: str):
    with pytest.raises(ScenarioError) as error:
        numeric_scenario("privacy.metrics=withheld", *overrides)
    assert f'with privacy.metrics = "withheld" {words}' in str(error.value) or words in str(error.value)
    assert numeric_scenario(
        "privacy.metrics=withheld", "merge.rule=persistence", "merge.confirm=evidence", "merge.rejoin=0"
    )


def test_explain_says_that_there_will_be_no_scores():
    parts = explain_scenario(numeric_scenario("privacy.metrics=withheld", "privacy.secure=true"))
    text = " ".join(sentence for part in parts for sentence in part.sentences)
    assert "Clients report no returns or other metrics, and none is evaluated: the run has no scores." in text
    assert "are not masked" not in text
