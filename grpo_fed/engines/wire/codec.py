"""Instructions and answers as Flower's records and back, without pickle. What comes in is checked before it is used.

A vector is one flat float32 array. Of a vector that its receiver nearly has (a client's point, a candidate step) only
the groups travel that are not, bit for bit, those of the shared blocks that the instruction began with; so a round trip
changes no bit. Vectors that go to many clients are written and read once: they are known by identity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from grpo_fed.engines.wire.arrays import GroupSelection, read, refuse_non_finite, write
from grpo_fed.engines.wire.validation import LARGEST, FieldReader, InvalidMessageError, check_records, show
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Start,
    Train,
    Trained,
)
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.metrics import REPORTED
from grpo_fed.scenario.scenario import Scenario

TRAIN, MEASURE, EVALUATE = "train", "query.measure", "evaluate"
"""Types of Flower messages."""

MAX_DISTANCE = 100.0
"""How far a client's point may lie from the shared blocks s, in units of 1 + ||s||."""
MOST_TRIALS = 64
"""In one message, for each block and one more."""
KEPT = 8
"""Vectors, the last ones seen, that are not written or read again."""

Key = TypeVar("Key")


def message_type(instruction: Instruction) -> str:
    """The type of message that carries it."""
    match instruction:
        case Train():
            return TRAIN
        case Measure():
            return MEASURE
        case Evaluate():
            return EVALUATE


def content_size(content: RecordDict) -> int:
    """Bytes of arrays, metrics and settings, with their names."""
    return sum(record.count_bytes() for record in content.values())


@final
class Codec:
    """What one federation's messages look like, for its server and for its clients."""

    def __init__(self, commons: SharedBlocks, scenario: Scenario) -> None:
        self._scenario, self._shared_blocks = scenario, commons
        self._size, self._blocks = commons.size, len(commons.blocks)
        self._groups = GroupSelection(commons.groups.ids.numpy(), len(commons.groups.names))
        self._needs_fisher = scenario.merge.rule == "fisher" or scenario.proximity.mode == "quadratic"
        self._sent: dict[tuple[int, int], _EncodedVectors] = {}
        self._seen: dict[int, tuple[bytes, np.ndarray]] = {}
        self._trials: tuple[object, list[float]] = ((), [])

    # What the server writes and a client reads

    def write_instruction(self, instruction: Instruction) -> RecordDict:
        """The content of a message of type `kind_of(instruction)`. Who is sent the same arrays is sent one object."""
        start = instruction.start
        sent = self._arrays(start.shared, instruction.candidate if isinstance(instruction, Measure) else None)
        told = ConfigRecord({"run": start.run, "round": start.round})
        told["personal"] = self._groups.mask(start.departed)
        match instruction:
            case Train():
                told["begin"], told["end"] = float(instruction.begin), float(instruction.end)
                told["look_back"] = instruction.measure_last_step
                if instruction.evaluate_first is not None:
                    _write_play(told, instruction.evaluate_first)
            case Measure():
                told["groups"] = sent.groups
                told["trials"] = self._flat(instruction.fractions)
            case Evaluate():
                _write_play(told, instruction.play)
        return RecordDict({"arrays": sent.record, "told": told})

    def read_instruction(self, kind: str, content: RecordDict) -> Instruction:
        """Of a message of this type; `Refused` if it is not one that a client can follow.

        `shared` is one object for all whose message has the same: it is not to be changed.
        """
        told_all = "commons" in content
        check_records(content, {"arrays", "told"} | ({"commons"} if told_all else set()))
        if told_all:
            self._refuse_others(content)
        arrays, told = FieldReader(content, "arrays", ArrayRecord), FieldReader(content, "told", ConfigRecord)
        run = told.take("run", str)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run):
            raise InvalidMessageError(f"told.run is {show(run)}; letters, digits, dots, - and _ name a folder here")
        first = 0 if kind == EVALUATE else 1
        number = told.count("round", first, self._scenario.rounds)
        personal = tuple(np.flatnonzero(self._groups.chosen("told.personal", told.take("personal", bytes))).tolist())
        start = Start(run, number, self._shared(arrays.take("shared", Array)), personal)
        instruction: Instruction
        if kind == TRAIN:
            begin = told.number("begin", 0, 1)
            end, look_back = told.number("end", begin, 1), told.take("look_back", bool)
            instruction = Train(start, begin, end, look_back, self._read_play(told) if told.has("number") else None)
        elif kind == MEASURE:
            instruction = Measure(start, self._read_candidate(arrays, told, start.shared), self._read_trials(told))
        elif kind == EVALUATE:
            instruction = Evaluate(start, self._read_play(told))
        else:
            raise InvalidMessageError(f"a message of type {show(kind)}; there are {TRAIN}, {MEASURE} and {EVALUATE}")
        arrays.end()
        told.end()
        return instruction

    def _refuse_others(self, content: RecordDict) -> None:
        """The message must be of these very commons."""
        fields = FieldReader(content, "commons", ConfigRecord)
        blocks, digest = fields.take("blocks", str), fields.take("digest", str)
        fields.end()
        if digest != self._shared_blocks.digest:
            raise InvalidMessageError(
                f"the server shares {show(blocks)} in other shapes or groups than this client has them; they must be"
                " alike for all, and all machines must have the same version of grpo_fed"
            )

    # What a client writes and the server reads

    def write_answer(self, instruction: Instruction, answer: Answer) -> RecordDict:
        """The content of a reply to it."""
        match answer:
            case Trained():
                return self._write_trained(instruction.start.shared, answer)
            case Measured():
                return RecordDict({"measured": MetricRecord({"kl": [float(kl) for kl in answer.kl]})})
            case Evaluated():
                return RecordDict({"played": _write_played(answer.played)})

    def read_answer(self, instruction: Instruction, content: RecordDict) -> Answer:
        """Of the client that was told this; `Refused` if it is not an answer to that, or cannot be true."""
        match instruction:
            case Train():
                return self._read_trained(instruction, content)
            case Measure():
                check_records(content, {"measured"})
                fields = FieldReader(content, "measured", MetricRecord)
                kl = fields.divergences("kl", len(instruction.fractions))
                fields.end()
                return Measured(kl)
            case Evaluate():
                check_records(content, {"played"})
                return Evaluated(self._read_played(content))

    # Instructions

    def _arrays(self, shared: np.ndarray, candidate: np.ndarray | None) -> _EncodedVectors:
        """The arrays of an instruction; those that were written already if they still are the same."""
        key = id(shared), id(candidate)
        found = self._sent.pop(key, None)
        if found is not None and found.still_is(shared, candidate):
            self._sent[key] = found
            return found
        written = {"shared": write(shared)}
        groups, part = b"", None
        if candidate is not None:
            chosen = self._groups.changed(candidate, shared)
            groups, part = self._groups.pack(chosen), write(self._groups.part(candidate, chosen))
            written["candidate"] = part
        copies = (shared.copy(), None if candidate is None else candidate.copy())
        sent = self._sent[key] = _EncodedVectors((shared, candidate), copies, ArrayRecord(written), groups)
        _forget(self._sent)
        return sent

    def _flat(self, trials: tuple[tuple[float, ...], ...]) -> list[float]:
        """[M x B], made once for those that all clients are asked for."""
        assert trials, "there is something to measure"
        assert self._blocks, "there is something that could move"
        if self._trials[0] is not trials:
            self._trials = trials, [float(alpha) for trial in trials for alpha in trial]
        return self._trials[1]

    def _shared(self, array: Array) -> np.ndarray:
        """[S], one object for all whose message has the same bytes, as long as nobody has changed it."""
        values = read("arrays.shared", array, self._size)
        found = self._seen.pop(id(array.data), None)
        if found is None or found[0] is not array.data or not np.array_equal(values, found[1]):
            refuse_non_finite("arrays.shared", values)
            found = array.data, values.copy()
        self._seen[id(array.data)] = found
        _forget(self._seen)
        return found[1]

    def _read_candidate(self, arrays: FieldReader, told: FieldReader, shared: np.ndarray) -> np.ndarray:
        """[S]."""
        chosen = self._groups.chosen("told.groups", told.take("groups", bytes))
        values = read("arrays.candidate", arrays.take("candidate", Array), self._groups.count(chosen))
        refuse_non_finite("arrays.candidate", values)
        return self._groups.fill(values, chosen, shared)

    def _read_trials(self, told: FieldReader) -> tuple[tuple[float, ...], ...]:
        """[M, B], each from 0 to 1."""
        flat, blocks = told.take("trials", list), self._blocks
        if not flat or not blocks or len(flat) % blocks or len(flat) > MOST_TRIALS * (blocks + 1) * blocks:
            raise InvalidMessageError(
                f"told.trials has {len(flat)} entries; it has to be some trials of {blocks} blocks each"
            )
        if not all(type(alpha) is float and 0 <= alpha <= 1 for alpha in flat):
            raise InvalidMessageError(f"told.trials is {show(flat)}; parts of a step are floats from 0 to 1")
        return tuple(tuple(flat[at : at + blocks]) for at in range(0, len(flat), blocks))

    def _read_play(self, told: FieldReader) -> EvaluationPlan:
        return EvaluationPlan(told.count("number", 0, self._scenario.rounds), told.take("deterministic", bool))

    # Answers

    def _write_trained(self, shared: np.ndarray, trained: Trained) -> RecordDict:
        point = np.asarray(trained.point, np.float32)
        chosen = self._groups.changed(point, shared)
        arrays = {"point": write(self._groups.part(point, chosen))}
        if trained.fisher is not None:
            arrays["fisher"] = write(trained.fisher)
        learned = MetricRecord({"steps": int(trained.steps), "episodes": int(trained.episodes)})
        learned["gain"], learned["spread"] = float(trained.gain), float(trained.spread)
        if trained.kl is not None:
            learned["kl"] = [float(kl) for kl in trained.kl]
        content = RecordDict(
            {
                "arrays": ArrayRecord(arrays),
                "sent": ConfigRecord({"groups": self._groups.pack(chosen)}),
                "learned": learned,
                "metrics": MetricRecord({name: float(value) for name, value in trained.metrics.items()}),
            }
        )
        if trained.played is not None:
            content["played"] = _write_played(trained.played)
        return content

    def _read_trained(self, train: Train, content: RecordDict) -> Trained:
        check_records(
            content, {"arrays", "sent", "learned", "metrics"} | ({"played"} if train.evaluate_first else set())
        )
        arrays, sent = FieldReader(content, "arrays", ArrayRecord), FieldReader(content, "sent", ConfigRecord)
        point = self._read_point(arrays, sent, train.start.shared)
        fisher = self._read_fisher(arrays)
        arrays.end()
        sent.end()
        learned = FieldReader(content, "learned", MetricRecord)
        steps = learned.count("steps", 0, self._most_steps)
        trained = Trained(
            point=point,
            steps=steps,
            episodes=learned.count("episodes", 0, steps),
            gain=learned.number("gain"),
            spread=learned.number("spread", 0),
            metrics=_read_metrics(content),
            fisher=fisher,
            kl=learned.divergences("kl", 1 + self._blocks) if train.measure_last_step and learned.has("kl") else None,
            played=self._read_played(content) if train.evaluate_first else None,
        )
        learned.end()
        return trained

    def _read_point(self, arrays: FieldReader, sent: FieldReader, shared: np.ndarray) -> np.ndarray:
        """[S]; what did not travel is as in the shared blocks."""
        chosen = self._groups.chosen("sent.groups", sent.take("groups", bytes))
        values = read("arrays.point", arrays.take("point", Array), self._groups.count(chosen))
        with np.errstate(over="ignore", invalid="ignore"):
            away = values - self._groups.part(shared, chosen)
            distance, limit = math.sqrt(away @ away), MAX_DISTANCE * (1 + math.sqrt(shared @ shared))
        if not distance <= limit or distance == math.inf:
            refuse_non_finite("arrays.point", values)
            raise InvalidMessageError(
                f"arrays.point is {distance:.3g} from the shared blocks; {limit:.3g} is as far as it may be"
            )
        return self._groups.fill(values, chosen, shared)

    def _read_fisher(self, arrays: FieldReader) -> np.ndarray | None:
        """[S], where the scenario needs it."""
        if not self._needs_fisher or (self._size == 0 and not arrays.has("fisher")):
            return None
        fisher = read("arrays.fisher", arrays.take("fisher", Array), self._size).copy()
        refuse_non_finite("arrays.fisher", fisher)
        if self._size and fisher.min() < 0:
            raise InvalidMessageError(
                f"arrays.fisher is {fisher.min():.3g} at entry {fisher.argmin()}; it is a mean of squares"
            )
        return fisher

    def _read_played(self, content: RecordDict) -> EvaluationSummary:
        settings, fields = self._scenario.evaluate, FieldReader(content, "played", MetricRecord)
        least = fields.number("least")
        most = fields.number("most", least)
        slack = 1e-6 * max(1.0, abs(least), abs(most))
        played = EvaluationSummary(
            mean=fields.number("mean", least - slack, most + slack),
            std=fields.number("std", 0, most - least + slack),
            least=least,
            most=most,
            episodes=fields.count("episodes", 1, settings.episodes),
            length=fields.number("length", 0, settings.step_limit),
        )
        fields.end()
        return played

    @cached_property
    def _most_steps(self) -> int:
        """That a client learns from in a round: the scenario's, and what its last update has too many."""
        scenario = self._scenario
        longest = scenario.rollout.horizon
        if scenario.objective.advantage == "group":
            longest = self._shared_blocks.max_episode_steps
        policies = 2 if scenario.personal.model else 1
        return scenario.steps + policies * scenario.rollout.num_envs * longest


@dataclass(frozen=True, eq=False)
class _EncodedVectors:
    """Arrays that were written."""

    vectors: tuple[np.ndarray, np.ndarray | None]
    """Which; as long as they are held here, nothing else has their ids."""
    copies: tuple[np.ndarray, np.ndarray | None]
    """What was in them."""
    record: ArrayRecord
    groups: bytes
    """Of the second, which groups travel."""

    def still_is(self, *vectors: np.ndarray | None) -> bool:
        """Whether these are the ones, unchanged."""
        return all(
            one is other and (one is None or copy is None or np.array_equal(one.view(np.uint32), copy.view(np.uint32)))
            for one, other, copy in zip(vectors, self.vectors, self.copies, strict=True)
        )


def _write_play(told: ConfigRecord, play: EvaluationPlan) -> None:
    told["number"], told["deterministic"] = play.number, play.deterministic


def _write_played(played: EvaluationSummary) -> MetricRecord:
    return MetricRecord(
        {
            "mean": float(played.mean),
            "std": float(played.std),
            "least": float(played.least),
            "most": float(played.most),
            "episodes": int(played.episodes),
            "length": float(played.length),
        }
    )


def _read_metrics(content: RecordDict) -> Mapping[str, float]:
    """Those that a client may tell, finite."""
    record = content["metrics"]
    if not isinstance(record, MetricRecord):
        raise InvalidMessageError(f"metrics is a {type(record).__name__}; it has to be a MetricRecord")
    metrics: dict[str, float] = {}
    for name, value in record.items():
        if name not in REPORTED:
            raise InvalidMessageError(f"metrics has {show(name)}, which a client does not tell")
        if not (isinstance(value, float) and abs(value) <= LARGEST):
            raise InvalidMessageError(
                f"metrics.{name} is {show(value)}; it has to be a finite float, at most {LARGEST:g} in size"
            )
        metrics[name] = value
    return metrics


def _forget(found: dict[Key, _EncodedVectors] | dict[Key, tuple[bytes, np.ndarray]]) -> None:
    """All but the latest."""
    while len(found) > KEPT:
        del found[next(iter(found))]
