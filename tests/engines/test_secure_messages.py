"""The messages of secure aggregation: there and back, between machines and processes, and refused if they cannot be."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, RecordDict

from grpo_fed.engines.wire import Codec, InvalidMessageError, message_type
from grpo_fed.engines.workers.frames import receive, send
from grpo_fed.federation.messages import Instruction, MaskPlan, SecureParts, SecureStep, Start, Train, Trained
from grpo_fed.policy.shared import resolve_shared_blocks
from tests.support.numeric_clients import numeric_scenario

SCENARIO = numeric_scenario("privacy.secure=true", count=4)
SHARED_BLOCKS = resolve_shared_blocks(SCENARIO)
CODEC = Codec(SHARED_BLOCKS, SCENARIO)
GROUPS = len(SHARED_BLOCKS.groups.names)
START = Start("run-1", 2, np.zeros(0, np.float32))
SESSION = "0123456789abcdef" * 2
SHARES = SecureStep(START, "shares", SESSION, ("c-1", "c-2"), ("AA==", "AQ=="))
REVEAL = replace(SHARES, step="reveal", answered=("c-1",))
STEPS = (SecureStep(START, "keys", SESSION), SHARES, REVEAL)
PLAN = MaskPlan(SESSION, ("c-1", "c-2", "c-3"), 4)
TRAIN = Train(Start("run-1", 2, SHARED_BLOCKS.initial.numpy()), 0.25, 0.5, mask=PLAN)
WORDS = np.arange(SHARED_BLOCKS.size + 1, dtype=np.uint32)[::-1] * np.uint32(2**20 + 1)
TRAINED = Trained(np.zeros(0, np.float32), 128, 3, 0.5, 1.0, {"losses/entropy": 0.5}, masked=WORDS)


def there_and_back(instruction: Instruction) -> Instruction:
    return CODEC.read_instruction(message_type(instruction), CODEC.write_instruction(instruction))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.step)
def test_a_step_arrives_as_it_was_sent(step: SecureStep):
    read = there_and_back(step)
    assert isinstance(read, SecureStep)
    assert (read.step, read.session, read.names, read.parts) == (step.step, SESSION, step.names, step.parts)
    assert (read.answered, read.start.run, read.start.round) == (step.answered, "run-1", 2)
    assert not read.start.shared.size


def test_a_plan_and_a_masked_vector_arrive_as_they_were_sent():
    bounded = replace(TRAIN, mask=replace(PLAN, bounds=tuple(np.linspace(0.1, 1.0, GROUPS).tolist())))
    for train in (TRAIN, bounded):
        read = there_and_back(train)
        assert isinstance(read, Train)
        assert read.mask == train.mask
    answer = CODEC.read_answer(TRAIN, CODEC.write_answer(TRAIN, TRAINED))
    assert isinstance(answer, Trained)
    assert answer.masked is not None
    np.testing.assert_array_equal(answer.masked, WORDS)
    assert answer.masked.dtype == np.uint32
    assert not answer.point.size
    assert (answer.steps, answer.metrics) == (128, {"losses/entropy": 0.5})


def test_parts_arrive_as_they_were_sent():
    for parts in (SecureParts((), (), "AAAA"), SecureParts(("c-2",), ("AQ==",))):
        read = CODEC.read_answer(SHARES, CODEC.write_answer(SHARES, parts))
        assert isinstance(read, SecureParts)
        assert (read.names, read.parts) == (parts.names, parts.parts)


def test_steps_pass_between_processes():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, {"instruction": REVEAL, "train": TRAIN, "answer": TRAINED, "parts": SecureParts(("a",), ("AA==",))})
        frame = receive(theirs)
    assert frame["instruction"].answered == ("c-1",)
    assert frame["train"].mask == PLAN
    np.testing.assert_array_equal(frame["answer"].masked, WORDS)
    assert (frame["parts"].names, frame["parts"].parts) == (("a",), ("AA==",))


def changed(**fields: object) -> Callable[[ConfigRecord], None]:
    def change(record: ConfigRecord) -> None:
        for name, value in fields.items():
            record[name] = value  # type: ignore[assignment]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(step="all"), r"instruction\.step is 'all'; there are keys, shares, reveal"),
        (changed(session="../x"), r"instruction\.session is '\.\./x'; it has to be 32 hexadecimal digits"),
        (changed(run="../x"), r"instruction\.run is '\.\./x'"),
        (changed(names=["c-1"]), "there are 2 parts for"),
        (changed(names=["c-1", "c-1"]), "there are 2 parts for"),
        (changed(parts=["A" * 600, "A"]), "it has to be a list of at most 4 short texts"),
        (changed(answered=["c"] * 5), "it has to be a list of at most 4 short texts"),
        (changed(more=1), "which is not part of this message"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused(change: Callable[[ConfigRecord], None], words: str):
    content = CODEC.write_instruction(REVEAL)
    change(content["instruction"])  # type: ignore[arg-type]
    with pytest.raises(InvalidMessageError, match=words):
        CODEC.read_instruction("query.secure", content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(session="x" * 32), r"instruction\.session"),
        (changed(peers=["c"] * 5), "peers is"),
        (changed(sum_of=5), r"sum_of is 5; it has to be from 1 to 4"),
        (changed(bounds=[0.0] * GROUPS), "they have to be above 0"),
        (changed(bounds=[1.0]), f"it has to be {GROUPS} finite floats"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(change: Callable[[ConfigRecord], None], words: str):
    content = CODEC.write_instruction(TRAIN)
    change(content["instruction"])  # type: ignore[arg-type]
    with pytest.raises(InvalidMessageError, match=words):
        CODEC.read_instruction("train", content)


def test_an_answer_that_is_not_masked_is_refused_and_so_is_one_of_another_size():
    plain = replace(TRAINED, masked=None, point=SHARED_BLOCKS.initial.numpy())
    with pytest.raises(InvalidMessageError, match="the records are"):
        CODEC.read_answer(TRAIN, CODEC.write_answer(TRAIN, plain))
    short = CODEC.write_answer(TRAIN, replace(TRAINED, masked=WORDS[:-1]))
    with pytest.raises(InvalidMessageError, match=r"arrays\.masked is"):
        CODEC.read_answer(TRAIN, short)
    both = CODEC.write_answer(TRAIN, TRAINED)
    both["arrays"]["point"] = Array(np.zeros(3, np.float32))  # type: ignore[index]
    with pytest.raises(InvalidMessageError, match="arrays has"):
        CODEC.read_answer(TRAIN, both)


def test_parts_for_others_than_were_asked_are_refused():
    for record, words in (
        (ConfigRecord({"own": "-", "names": ["c-9"], "parts": ["AA=="]}), "they have to be among"),
        (ConfigRecord({"own": "-", "names": ["c-1"]}), "there are 0 parts for"),
        (ConfigRecord({"own": "A" * 600}), "they have to be among"),
        (ConfigRecord({"names": ["c-1"], "parts": ["AA=="]}), "own is missing"),
    ):
        with pytest.raises(InvalidMessageError, match=words):
            CODEC.read_answer(SHARES, RecordDict({"secure": record}))
