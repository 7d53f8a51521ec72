"""Instructions and answers as Flower's records and back, without pickle; what is received is checked before it is used.

A vector is one flat float32 array. A client's point and a candidate step differ from the shared blocks that the
instruction carries in some parameter groups only, often; of such a vector only the groups travel that differ in any
bit. So a round trip changes no bit, and clients that leave most groups alone send little.
"""

from __future__ import annotations

from typing import final

from flwr.app import RecordDict

from grpo_fed.engines.wire.answers import AnswerCodec
from grpo_fed.engines.wire.arrays import GroupSelection
from grpo_fed.engines.wire.instructions import InstructionCodec
from grpo_fed.federation.messages import Answer, Instruction
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario


def content_size(content: RecordDict) -> int:
    """Count the bytes of a message's arrays, metrics and settings, with their names."""
    return sum(record.count_bytes() for record in content.values())


@final
class Codec:
    """Encodes and decodes the messages of one federation, for its server and for its clients."""

    def __init__(self, shared_blocks: SharedBlocks, scenario: Scenario) -> None:
        groups = GroupSelection(shared_blocks.groups.ids.numpy(), len(shared_blocks.groups.names))
        self._instructions = InstructionCodec(shared_blocks, scenario, groups)
        self._answers = AnswerCodec(shared_blocks, scenario, groups)

    def write_instruction(self, instruction: Instruction) -> RecordDict:
        """Encode an instruction, as the content of a message of type `message_type(instruction)`.

        Instructions with the same arrays get the same object for them.
        """
        return self._instructions.write(instruction)

    def read_instruction(self, kind: str, content: RecordDict) -> Instruction:
        """Decode the content of a message of type `kind`; InvalidMessageError if a client cannot follow it.

        Instructions that carry the same bytes get the same `shared`, which cannot be written to.
        """
        return self._instructions.read(kind, content)

    def write_answer(self, instruction: Instruction, answer: Answer) -> RecordDict:
        """Encode an answer, as the content of a reply to the instruction."""
        return self._answers.write(instruction, answer)

    def read_answer(self, instruction: Instruction, content: RecordDict) -> Answer:
        """Decode a reply; InvalidMessageError if it does not answer the instruction, or cannot be true."""
        return self._answers.read(instruction, content)
