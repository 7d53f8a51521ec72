"""The state of a curriculum that the server steers, and the evidence for it, as they travel."""

from __future__ import annotations

import dataclasses
import math

import pytest
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from grpo_fed.engines.wire import InvalidMessageError
from tests.engines.test_codec import CODEC, TRAIN, TRAINED, make_codec, plain

LEVELS = dataclasses.replace(TRAIN, curriculum=(0.1, 0.0, 2.0, 0.0, 30.5, 0.0))
JUDGED = dataclasses.replace(TRAINED, evidence=(2.0, 1.0, 40.1, 0.0))


def test_the_state_of_a_curriculum_and_its_evidence_survive_bit_for_bit():
    request = recorddict_from_proto(recorddict_to_proto(CODEC.write_instruction(LEVELS)))
    decoded = make_codec().read_instruction("train", request)
    assert plain(decoded) == plain(LEVELS)
    reply = recorddict_from_proto(recorddict_to_proto(CODEC.write_answer(decoded, JUDGED)))
    assert plain(CODEC.read_answer(LEVELS, reply)) == plain(JUDGED)
    request["instruction"]["curriculum"] = [0.1, math.nan]
    with pytest.raises(InvalidMessageError, match=r"instruction\.curriculum is .* 2 finite floats"):
        CODEC.read_instruction("train", request)


@pytest.mark.parametrize(
    ("evidence", "error"),
    [
        ((2.0, 1.0, 40.0), r"training\.evidence .* 4 finite floats"),
        ((2.0, 1.0, 40.0, math.inf), r"training\.evidence .* 4 finite floats"),
        ((2.0, 4.0, 40.0, 0.0), r"begin with 2 numbers of episodes, 0 to 3"),
        ((-1.0, 1.0, 40.0, 0.0), r"begin with 2 numbers of episodes, 0 to 3"),
        ((), r"training\.evidence is missing"),
    ],
)
def test_evidence_that_cannot_be_true_is_refused(evidence: tuple[float, ...], error: str):
    reply = CODEC.write_answer(LEVELS, dataclasses.replace(TRAINED, evidence=evidence))
    with pytest.raises(InvalidMessageError, match=error):
        CODEC.read_answer(LEVELS, reply)


def test_evidence_that_was_not_asked_for_is_refused():
    with pytest.raises(InvalidMessageError, match=r"training has \['evidence'\]"):
        CODEC.read_answer(TRAIN, CODEC.write_answer(TRAIN, JUDGED))
