"""The messages of secure aggregation: steps and their answers, how a client masks, and what it has masked."""

from __future__ import annotations

import re
from typing import final

import numpy as np
from flwr.app import Array, ConfigRecord, RecordDict

from grpo_fed.engines.wire.arrays import decode_vector
from grpo_fed.engines.wire.validation import FieldReader, InvalidMessageError, check_records, show
from grpo_fed.federation.masked_vectors import MaskedVectors
from grpo_fed.federation.messages import MaskPlan, SecureParts, SecureStep, SecureStepName, Start
from grpo_fed.federation.server_state import RUN_NAME
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario

INSTRUCTION, PARTS = "instruction", "secure"
"""The records of a step and of its answer."""
STEPS: tuple[SecureStepName, ...] = ("keys", "shares", "reveal")
LONGEST_PART = 512
"""Characters of a key or a share."""
SESSION = re.compile(r"[0-9a-f]{32}")


@final
class SecureCodec:
    """Encodes and decodes what secure aggregation sends, in one federation."""

    def __init__(self, shared_blocks: SharedBlocks, scenario: Scenario) -> None:
        self._size = MaskedVectors.of(scenario, shared_blocks).size if scenario.privacy.secure else 0
        self._groups = len(shared_blocks.groups.names)
        self._most = sum(entry.count for entry in scenario.clients)

    def write_step(self, step: SecureStep) -> RecordDict:
        """Encode a step."""
        fields = ConfigRecord({"run": step.start.run, "round": step.start.round})
        fields["step"], fields["session"] = step.step, step.session
        for key, texts in (("names", step.names), ("parts", step.parts), ("answered", step.answered)):
            if texts:  # Flower cannot count an empty list
                fields[key] = list(texts)
        return RecordDict({INSTRUCTION: fields})

    def read_step(self, content: RecordDict, most_rounds: int) -> SecureStep:
        """Decode a step; InvalidMessageError if a client cannot take it."""
        fields = FieldReader(content, INSTRUCTION, ConfigRecord)
        start = Start(read_run_name(fields), fields.take_count("round", 1, most_rounds), np.zeros(0, np.float32))
        name = fields.take("step", str)
        step = next((each for each in STEPS if each == name), None)
        if step is None:
            raise InvalidMessageError(f"instruction.step is {show(name)}; there are {', '.join(STEPS)}")
        session = _read_session(fields)
        names, parts = self._read_pairs(fields)
        read = SecureStep(start, step, session, names, parts, self._read_texts(fields, "answered"))
        fields.refuse_rest()
        return read

    def write_parts(self, answer: SecureParts) -> RecordDict:
        """Encode the answer to a step."""
        fields = ConfigRecord({"own": answer.own or "-"})
        if answer.names:
            fields["names"], fields["parts"] = list(answer.names), list(answer.parts)
        return RecordDict({PARTS: fields})

    def read_parts(self, step: SecureStep, content: RecordDict) -> SecureParts:
        """Decode the answer to a step; InvalidMessageError if it is for others than the step names."""
        check_records(content, {PARTS})
        fields = FieldReader(content, PARTS, ConfigRecord)
        own = fields.take("own", str)
        names, parts = self._read_pairs(fields)
        fields.refuse_rest()
        if len(own) > LONGEST_PART or not {*names} <= {*step.names}:
            raise InvalidMessageError(f"secure.names is {show(names)}; they have to be among {show(step.names)}")
        return SecureParts(names, parts, own)

    def write_plan(self, fields: ConfigRecord, plan: MaskPlan) -> None:
        """Add to an instruction to learn how the client masks."""
        fields["session"], fields["peers"], fields["sum_of"] = plan.session, list(plan.peers), plan.clients
        if plan.bounds:
            fields["bounds"] = list(plan.bounds)

    def read_plan(self, fields: FieldReader) -> MaskPlan:
        """Read how the client masks."""
        session, peers = _read_session(fields), self._read_texts(fields, "peers")
        clients = fields.take_count("sum_of", 1, self._most)
        bounds = fields.take_floats("bounds", self._groups) if fields.has("bounds") else ()
        if any(bound <= 0 for bound in bounds):
            raise InvalidMessageError(f"instruction.bounds is {show(bounds)}; they have to be above 0")
        return MaskPlan(session, peers, clients, bounds)

    def read_masked(self, arrays: FieldReader) -> np.ndarray:
        """Read a masked vector, [N] uint32: any bits may be one."""
        return decode_vector("arrays.masked", arrays.take("masked", Array), self._size, "uint32")

    def _read_pairs(self, fields: FieldReader) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Read names and a part for each."""
        names, parts = self._read_texts(fields, "names"), self._read_texts(fields, "parts")
        if len(names) != len(parts) or len({*names}) != len(names):
            raise InvalidMessageError(f"there are {len(parts)} parts for {show(names)}; each name has to have one")
        return names, parts

    def _read_texts(self, fields: FieldReader, name: str) -> tuple[str, ...]:
        """Read a list of short texts, empty if it is not there."""
        texts = fields.take(name, list) if fields.has(name) else []
        if len(texts) > self._most or not all(type(text) is str and len(text) <= LONGEST_PART for text in texts):
            raise InvalidMessageError(
                f"{name} is {show(texts)}; it has to be a list of at most {self._most} short texts"
            )
        return tuple(texts)


def read_run_name(fields: FieldReader) -> str:
    """Read the name of a run, by which a client names a folder."""
    run = fields.take("run", str)
    if not RUN_NAME.fullmatch(run):
        raise InvalidMessageError(
            f"instruction.run is {show(run)}; it names a folder here, of letters, digits, dots, - and _"
        )
    return run


def _read_session(fields: FieldReader) -> str:
    session = fields.take("session", str)
    if not SESSION.fullmatch(session):
        raise InvalidMessageError(f"instruction.session is {show(session)}; it has to be 32 hexadecimal digits")
    return session
