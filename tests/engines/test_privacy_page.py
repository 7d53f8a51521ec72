"""docs/privacy.md lists every field that leaves a client."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict

from grpo_fed.engines.wire import Codec, message_type
from grpo_fed.engines.wire.grids import REASON_LENGTH
from grpo_fed.engines.wire.handshake import Hello, write_hello
from grpo_fed.federation.messages import (
    Answer,
    Evaluated,
    Instruction,
    MaskPlan,
    SecureParts,
    SecureStep,
    Start,
    Train,
    Trained,
)
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import TaskShape
from tests.engines.test_codec import CODEC, EVALUATE, MEASURE, MEASURED, SIZE, SUMMARY, TEXT, TRAIN, TRAINED
from tests.support.numeric_clients import numeric_scenario
from tests.support.real_clients import RealTransport
from tests.support.small_federation import TINY

PAGE = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")


MASKED_SCENARIO = numeric_scenario("privacy.secure=true")
MASKED_BLOCKS = resolve_shared_blocks(MASKED_SCENARIO)
MASKED_CODEC = Codec(MASKED_BLOCKS, MASKED_SCENARIO)
MASKED_TRAIN = Train(
    Start("run", 1, MASKED_BLOCKS.initial.numpy()), 0.0, 0.5, mask=MaskPlan("0" * 32, ("c-1", "c-2"), 3)
)
MASKED = Trained(np.zeros(0, np.float32), 1, 0, 0.0, 0.0, {}, masked=np.zeros(MASKED_BLOCKS.size + 1, np.uint32))
STEP = SecureStep(Start("run", 1, np.zeros(0, np.float32)), "shares", "0" * 32, ("a",), ("AA==",))


def listed_fields() -> set[tuple[str, str]]:
    """Read the table of the page: message and field."""
    table = PAGE.split("| message | field |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    return {
        (message.strip(), field)
        for messages, fields in rows
        for message in messages.split(",")
        for field in re.findall(r"`([^`]+)`", fields)
    }


def fields_of(message: str, content: RecordDict) -> Iterator[tuple[str, str]]:
    """List the fields of a message as the page does, all metrics as one."""
    for name, record in content.items():
        if name == "metrics":
            yield message, "metrics.*"
        else:
            yield from ((message, f"{name}.{field}") for field in record)


class CapturingTransport(RealTransport):
    """Clients in this process, whose answers are written as messages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.codec = Codec(self.shared_blocks, self.scenario)
        self.fields: set[tuple[str, str]] = set()

    def send(
        self, instructions: Mapping[str, Instruction], deadline: float | None
    ) -> Iterator[tuple[str, Answer | Failure]]:
        for name, answer in super().send(instructions, deadline):
            assert not isinstance(answer, Failure)
            content = self.codec.write_answer(instructions[name], answer)
            self.fields |= set(fields_of(kind_of(instructions[name]), content))
            yield name, answer


def kind_of(instruction: Instruction) -> str:
    """Name a message as the page does."""
    return message_type(instruction).removeprefix("query.")


@pytest.mark.parametrize(
    "overrides",
    [
        ("proximity.mode=measured", "wire.dtype=float16", "evaluate.twins=true"),
        ("proximity.mode=quadratic", "evaluate.adapt=1", "rounds=3"),
        ("method=fedavg", "privacy.secure=true"),
    ],
    ids=["measured", "quadratic", "masked"],
)
def test_every_field_that_leaves_a_client_of_a_federation_is_listed(tmp_path: Path, overrides: tuple[str, ...]):
    transport = CapturingTransport(Scenario.loads(TINY, overrides=overrides), tmp_path)
    transport.federation(evaluate_with_next_round=True).run()
    for clients in transport.clients.values():
        clients.close()
    assert len(transport.fields) > 10
    assert not transport.fields - listed_fields()


def test_every_field_that_a_client_may_send_is_listed_and_no_other():
    summary = dataclasses.replace(SUMMARY, adapted=(1.0,), cost=0.5)
    trained = dataclasses.replace(TRAINED, evaluation=summary, since=0, evidence=(1.0, 2.0))
    half = dataclasses.replace(TRAINED, difference=np.zeros(SIZE, np.float16), fisher=None)
    rounded = Scenario.loads(TEXT.format(mode="off", policy="", hidden=3), overrides=["wire.dtype=float16"])
    contents = [
        ("train", CODEC.write_answer(TRAIN, trained)),
        ("train", Codec(resolve_shared_blocks(rounded), rounded).write_answer(TRAIN, half)),
        ("measure", CODEC.write_answer(MEASURE, MEASURED)),
        ("evaluate", CODEC.write_answer(EVALUATE, Evaluated(summary))),
        ("train", MASKED_CODEC.write_answer(MASKED_TRAIN, MASKED)),
        ("secure", MASKED_CODEC.write_answer(STEP, SecureParts(("a",), ("AA==",), "AA=="))),
        ("hello", write_hello(Hello("cart", TaskShape(4, "tokens", (2,), 500, "0" * 64)))),
    ]
    written = {field for message, content in contents for field in fields_of(message, content)}
    assert written == listed_fields()


def test_a_field_that_is_not_listed_is_noticed():
    content = CODEC.write_answer(MEASURE, MEASURED)
    content["measurement"]["observation"] = 1.0
    assert set(fields_of("measure", content)) - listed_fields() == {("measure", "measurement.observation")}


def test_what_a_failure_tells_is_as_long_as_the_page_says():
    assert f"{REASON_LENGTH} letters" in PAGE
