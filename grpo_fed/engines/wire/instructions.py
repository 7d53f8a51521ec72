"""Instructions as Flower's records, and back: what the server writes and a client reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from grpo_fed.engines.wire.arrays import GroupSelection, check_finite, decode_vector, encode_vector
from grpo_fed.engines.wire.handshake import SHARED_BLOCKS
from grpo_fed.engines.wire.secure import SecureCodec, read_run_name
from grpo_fed.engines.wire.validation import FieldReader, InvalidMessageError, check_records, show
from grpo_fed.engines.wire.vector_cache import VectorCache
from grpo_fed.federation.messages import Evaluate, EvaluationPlan, Instruction, Measure, SecureStep, Start, Train
from grpo_fed.federation.state_store import MOST_ANSWERS
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.scenario.scenario import Scenario

TRAIN, MEASURE, EVALUATE, SECURE = "train", "query.measure", "evaluate", "query.secure"
"""Types of Flower messages."""

MAX_QUERIES = 64
"""How many sets of step fractions a `Measure` may have, times the number of blocks plus one."""

MAX_RATE = 1e9
"""What a client may be told to multiply its learning rate by."""
MAX_CURRICULUM = 100_000
"""How many numbers the state of a curriculum may have."""


def message_type(instruction: Instruction) -> str:
    """Return the type of the Flower message that carries an instruction."""
    match instruction:
        case Train():
            return TRAIN
        case Measure():
            return MEASURE
        case Evaluate():
            return EVALUATE
        case SecureStep():
            return SECURE


@dataclass(frozen=True, eq=False)
class EncodedVectors:
    """The vectors of an instruction, encoded."""

    record: ArrayRecord
    groups: bytes
    """The packed selection of the candidate's groups that travel; empty without a candidate."""


@final
class InstructionCodec:
    """Encodes and decodes the instructions of one federation.

    A message has a record `arrays` with the vectors and a record `instruction` with everything else; on Flower's own
    grids also `shared_blocks`, which names and identifies what the clients share.
    """

    def __init__(self, shared_blocks: SharedBlocks, scenario: Scenario, groups: GroupSelection) -> None:
        self._digest, self._rounds, self._groups = shared_blocks.digest, scenario.rounds, groups
        self._most_work = scenario.rounds * (MOST_ANSWERS if scenario.round.again == "at-once" else 1)
        """The highest number of a client's work: with `round.again = "at-once"` it may do some in a round."""
        self._base = shared_blocks.base
        self._size, self._blocks = shared_blocks.size, len(shared_blocks.blocks)
        self._encoded: VectorCache[EncodedVectors] = VectorCache()
        self._decoded: VectorCache[np.ndarray] = VectorCache()
        self._secure = SecureCodec(shared_blocks, scenario)

    # For the server

    def write(self, instruction: Instruction) -> RecordDict:
        """Encode an instruction."""
        if isinstance(instruction, SecureStep):
            return self._secure.write_step(instruction)
        start = instruction.start
        vectors = self._encode(start.shared, instruction.candidate if isinstance(instruction, Measure) else None)
        fields = ConfigRecord({"run": start.run, "round": start.round})
        fields["departed"] = self._groups.pack_numbers(start.departed)
        match instruction:
            case Train():
                fields["begin"], fields["end"] = float(instruction.begin), float(instruction.end)
                fields["last_step"] = instruction.measure_last_step
                if instruction.compare:
                    fields["compare"] = self._groups.pack_numbers(instruction.compare)
                if instruction.curriculum:
                    fields["curriculum"] = list(instruction.curriculum)
                if instruction.rate != 1.0:
                    fields["rate"] = float(instruction.rate)
                if instruction.evaluate_first is not None:
                    _write_plan(fields, instruction.evaluate_first)
                if instruction.mask is not None:
                    self._secure.write_plan(fields, instruction.mask)
            case Measure():
                assert instruction.fractions, "there is a step to measure"
                assert self._blocks, "there are blocks that could move"
                fields["groups"] = vectors.groups
                fields["alphas"] = [float(alpha) for alpha in chain.from_iterable(instruction.fractions)]
            case Evaluate():
                _write_plan(fields, instruction.plan)
        return RecordDict({"arrays": vectors.record, "instruction": fields})

    def _encode(self, shared: np.ndarray, candidate: np.ndarray | None) -> EncodedVectors:
        """Encode the shared blocks [S] and, of a candidate [S], the groups that differ from them."""

        def make() -> EncodedVectors:
            arrays, mask = {"shared": encode_vector(shared)}, b""
            if candidate is not None:
                groups = self._groups.select_changed(candidate, shared)
                mask = self._groups.pack(groups)
                arrays["candidate"] = encode_vector(self._groups.extract(candidate, groups))
            return EncodedVectors(ArrayRecord(arrays), mask)

        return self._encoded.get((shared, candidate), make)

    # For a client

    def read(self, kind: str, content: RecordDict) -> Instruction:
        """Decode the content of a message of type `kind`; InvalidMessageError if a client cannot follow it."""
        names_shared_blocks, has_arrays = SHARED_BLOCKS in content, {"arrays"} if kind != SECURE else set()
        check_records(content, {"instruction"} | has_arrays | ({SHARED_BLOCKS} if names_shared_blocks else set()))
        if names_shared_blocks:
            self._check_shared_blocks(content)
        if kind == SECURE:
            return self._secure.read_step(content, self._most_work)
        arrays, fields = FieldReader(content, "arrays", ArrayRecord), FieldReader(content, "instruction", ConfigRecord)
        start = self._read_start(kind, arrays, fields)
        instruction: Instruction
        if kind == TRAIN:
            begin = fields.take_float("begin", 0, 1)
            end, measure_last_step = fields.take_float("end", begin, 1), fields.take("last_step", bool)
            plan = self._read_plan(fields) if fields.has("number") else None
            compare = self._read_groups(fields, "compare") if fields.has("compare") else ()
            levels = fields.take_some_floats("curriculum", MAX_CURRICULUM) if fields.has("curriculum") else ()
            rate = fields.take_float("rate", 0, MAX_RATE) if fields.has("rate") else 1.0
            mask = self._secure.read_plan(fields) if fields.has("session") else None
            instruction = Train(start, begin, end, measure_last_step, plan, compare, levels, rate, mask)
        elif kind == MEASURE:
            candidate = self._read_candidate(arrays, fields, start.shared)
            instruction = Measure(start, candidate, self._read_fractions(fields))
        elif kind == EVALUATE:
            instruction = Evaluate(start, self._read_plan(fields))
        else:
            raise InvalidMessageError(
                f"a message of type {show(kind)}; there are {TRAIN}, {MEASURE}, {EVALUATE} and {SECURE}"
            )
        arrays.refuse_rest()
        fields.refuse_rest()
        return instruction

    def _check_shared_blocks(self, content: RecordDict) -> None:
        """Raise InvalidMessageError if the server's shared blocks are not this client's."""
        fields = FieldReader(content, SHARED_BLOCKS, ConfigRecord)
        blocks, digest = fields.take("blocks", str), fields.take("digest", str)
        base = fields.take("base", str) if fields.has("base") else ""
        if fields.has("entry"):
            fields.take("entry", str)  # `check_own_entry` has looked at it
        fields.refuse_rest()
        if base != self._base:
            raise InvalidMessageError(
                f"language.model: this client's base has the digest {show(self._base)}, the server's clients share"
                f" adapters of {show(base)}; give all clients the same files"
            )
        if digest != self._digest:
            raise InvalidMessageError(
                f"the server shares {show(blocks)} in other shapes or groups than this client has them; all clients"
                " must share the same blocks, and all machines must have the same version of grpo_fed"
            )

    def _read_start(self, kind: str, arrays: FieldReader, fields: FieldReader) -> Start:
        run = read_run_name(fields)
        round = fields.take_count("round", 0 if kind == EVALUATE else 1, self._most_work)
        departed = self._read_groups(fields, "departed")
        return Start(run, round, self._decode_shared(arrays.take("shared", Array)), departed)

    def _read_groups(self, fields: FieldReader, name: str) -> tuple[int, ...]:
        """Read the numbers of parameter groups."""
        chosen = self._groups.unpack(f"instruction.{name}", fields.take(name, bytes))
        return tuple(np.flatnonzero(chosen).tolist())

    def _decode_shared(self, array: Array) -> np.ndarray:
        """Decode the shared blocks to [S], one read-only object for the same bytes."""
        vector = decode_vector("arrays.shared", array, self._size)

        def make() -> np.ndarray:
            check_finite("arrays.shared", vector)
            return vector

        return self._decoded.get((array.data,), make)

    def _read_candidate(self, arrays: FieldReader, fields: FieldReader, shared: np.ndarray) -> np.ndarray:
        """Read a candidate [S]; the groups that did not travel are those of the shared blocks."""
        groups = self._groups.unpack("instruction.groups", fields.take("groups", bytes))
        size = self._groups.count_columns(groups)
        values = decode_vector("arrays.candidate", arrays.take("candidate", Array), size)
        check_finite("arrays.candidate", values)
        return self._groups.fill(values, groups, shared)

    def _read_fractions(self, fields: FieldReader) -> tuple[tuple[float, ...], ...]:
        """Read step fractions [M, B], each from 0 to 1."""
        alphas, blocks = fields.take("alphas", list), self._blocks
        if not alphas or not blocks or len(alphas) % blocks or len(alphas) > MAX_QUERIES * (blocks + 1) * blocks:
            raise InvalidMessageError(
                f"instruction.alphas has {len(alphas)} entries; it has to be a multiple of {blocks} blocks"
            )
        if not all(type(alpha) is float and 0 <= alpha <= 1 for alpha in alphas):
            raise InvalidMessageError(
                f"instruction.alphas is {show(alphas)}; fractions of a step are floats from 0 to 1"
            )
        return tuple(tuple(alphas[at : at + blocks]) for at in range(0, len(alphas), blocks))

    def _read_plan(self, fields: FieldReader) -> EvaluationPlan:
        return EvaluationPlan(fields.take_count("number", 0, self._rounds), fields.take("deterministic", bool))


def _write_plan(fields: ConfigRecord, plan: EvaluationPlan) -> None:
    fields["number"], fields["deterministic"] = plan.number, plan.deterministic
