"""The query by which a client measures the KL of steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from grpo_fed.flower import answer_query
from grpo_fed.flower.array_blocks import cut_array_blocks
from grpo_fed.flower.block_server import Candidate
from grpo_fed.flower.measurement import make_query, read_answer, to_arrays
from tests.support.in_memory_grid import enter_run

BEFORE = {"a.weight": np.zeros(2, np.float32), "other": np.ones(1, np.float32), "b.weight": np.full(1, 4, np.float16)}
AFTER = {"a.weight": np.array([2, 4], np.float32), "other": np.ones(1, np.float32), "b.weight": np.zeros(1, np.float16)}


def test_a_client_measures_each_step_with_each_block_at_its_fraction(monkeypatch: pytest.MonkeyPatch):
    enter_run(monkeypatch)
    layout = cut_array_blocks(BEFORE, {"a": ["a.*"], "b": ["b.*"]}).layout
    query = make_query(Candidate(BEFORE, AFTER), [(1.0, 1.0), (0.5, 0.0), (0.0, 0.25)], layout)
    seen: list[dict[str, list[float]]] = []

    def kl(before: ArrayRecord, after: ArrayRecord) -> float:
        assert to_arrays(before)["b.weight"].tolist() == [4]
        seen.append({name: array.tolist() for name, array in to_arrays(after).items()})
        return float(len(seen))

    reply = answer_query(Message(query, 1, "query"), kl)
    assert seen == [
        {"a.weight": [2, 4], "other": [1], "b.weight": [0]},
        {"a.weight": [1, 2], "other": [1], "b.weight": [4]},
        {"a.weight": [0, 0], "other": [1], "b.weight": [3]},
    ]
    assert read_answer(reply.content, 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (RecordDict(), "its answer has no 2 numbers 'kl'; answer with grpo_fed.flower.answer_query"),
        (RecordDict({"kl": MetricRecord({"kl": [1.0]})}), "its answer has no 2 numbers"),
        (RecordDict({"kl": MetricRecord({"kl": 1.0})}), "its answer has no 2 numbers"),
        (RecordDict({"kl": MetricRecord({"kl": [1.0, -0.1]})}), "its KL is -0.1, and no KL is below 0"),
    ],
)
def test_answers_that_are_none_are_refused(content: RecordDict, text: str):
    with pytest.raises(ValueError, match=text):
        read_answer(content, 2)


def test_a_broken_policy_and_rounding_below_0_are_answers():
    broken, rounded = read_answer(RecordDict({"kl": MetricRecord({"kl": [math.nan, -1e-9]})}), 2)
    assert math.isnan(broken)
    assert rounded == 0
