"""Instructions and answers as Flower's records and back, without pickle. What comes in is checked before it is used.

A vector is one flat float32 array. Of a vector that its receiver nearly has (a client's point, a candidate step) only
the groups travel that are not, bit for bit, those of the shared blocks that the instruction began with; so a round trip
changes no bit. Vectors that go to many clients are written and read once: they are known by identity.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar, final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from grpo_fed.commons import Commons
from grpo_fed.messages import (
    METRICS,
    Answer,
    Evaluate,
    Evaluated,
    Instruction,
    Measure,
    Measured,
    Play,
    Played,
    Start,
    Train,
    Trained,
)
from grpo_fed.scenario import Scenario
from grpo_fed.tasks import ENDLESS, KINDS, Form, Kind

TRAIN, MEASURE, EVALUATE, HELLO = "train", "query.measure", "evaluate", "query.hello"
"""Types of Flower messages; the last asks a node for the name of its client."""

FURTHEST = 100.0
"""How far a client's point may lie from the shared blocks s, in units of 1 + ||s||."""
LARGEST = 1e100
"""Number that a client may tell of itself: means and squares of such are numbers too, as JSON needs them."""
MOST_TRIALS = 64
"""In one message, for each block and one more."""
WIDEST = 2**18
"""Entries of an observation, or of an action, that a server takes a client's word for."""
KEPT = 8
"""Vectors, the last ones seen, that are not written or read again."""

Value = TypeVar("Value")


class Refused(ValueError):
    """What came in is not what it has to be; nothing of it is used."""


def kind_of(instruction: Instruction) -> str:
    """The type of message that carries it."""
    match instruction:
        case Train():
            return TRAIN
        case Measure():
            return MEASURE
        case Evaluate():
            return EVALUATE


def size_of(content: RecordDict) -> int:
    """Bytes of arrays, metrics and settings, with their names."""
    return sum(record.count_bytes() for record in content.values())


@dataclass(frozen=True)
class Hello:
    """What a node says of itself."""

    client: str
    form: Form | None = None
    """Of its task; None where that cannot be made there, which it will say when it is told to train."""


def write_hello(hello: Hello) -> RecordDict:
    """A node's answer to `HELLO`."""
    told = ConfigRecord({"client": hello.client})
    if hello.form is not None:
        told["observation_size"], told["kind"] = hello.form.observation_size, hello.form.kind
        told["sizes"], told["episode_limit"] = list(hello.form.sizes), hello.form.episode_limit
    return RecordDict({"hello": told})


def read_hello(content: RecordDict) -> Hello:
    """What a node answered; `Refused` for a task that cannot be."""
    _expect(content, {"hello"})
    fields = _Fields(content, "hello", ConfigRecord)
    hello = Hello(fields.take("client", str), _read_form(fields) if fields.has("kind") else None)
    fields.end()
    return hello


def _read_form(fields: _Fields) -> Form:
    size, told = fields.count("observation_size", 1, WIDEST), fields.take("kind", str)
    kind: Kind | None = next((kind for kind in KINDS if kind == told), None)
    if kind is None:
        raise Refused(f"hello.kind is {_show(told)}; there are {', '.join(KINDS)}")
    sizes = fields.take("sizes", list)
    right = all(type(one) is int and one > 0 for one in sizes) and 0 < sum(sizes) <= WIDEST
    if not right or (len(sizes) > 1 and kind != "multi-categorical"):
        raise Refused(f"hello.sizes is {_show(sizes)}; they have to be what a {kind} action has, {WIDEST} at most")
    return Form(size, kind, tuple(sizes), fields.count("episode_limit", 0, ENDLESS))


def write_commons(commons: Commons) -> ConfigRecord:
    """What a client must be told that knows no other's task: `commons` in an instruction's message."""
    return ConfigRecord({"blocks": json.dumps(commons.blocks), "digest": commons.digest})


def read_blocks(content: RecordDict) -> tuple[str, ...]:
    """The names of the shared blocks, which come with an instruction; that they are the right ones is for the `Wire`.

    `Refused` if there are none.
    """
    if "commons" not in content:
        raise Refused(f"the records are {_show(sorted(content))}; commons is missing")
    text = _Fields(content, "commons", ConfigRecord).take("blocks", str)
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Refused(f"commons.blocks is {_show(text)}; it has to be a JSON list of names")
    return tuple(names)


@final
class Wire:
    """What one federation's messages look like, for its server and for its clients."""

    def __init__(self, commons: Commons, scenario: Scenario) -> None:
        self._scenario, self._commons = scenario, commons
        self._size, self._blocks = commons.size, len(commons.blocks)
        self._groups = _Groups(commons.groups.ids.numpy(), len(commons.groups.names))
        self._needs_fisher = scenario.merge.rule == "fisher" or scenario.proximity.mode == "quadratic"
        self._sent: dict[tuple[int, int], _Sent] = {}
        self._seen: dict[int, tuple[bytes, np.ndarray]] = {}
        self._trials: tuple[object, list[float]] = ((), [])

    # What the server writes and a client reads

    def write_instruction(self, instruction: Instruction) -> RecordDict:
        """The content of a message of type `kind_of(instruction)`. Who is sent the same arrays is sent one object."""
        start = instruction.start
        sent = self._arrays(start.shared, instruction.candidate if isinstance(instruction, Measure) else None)
        told = ConfigRecord({"run": start.run, "round": start.round})
        told["personal"] = self._groups.mask(start.personal)
        match instruction:
            case Train():
                told["begin"], told["end"] = float(instruction.begin), float(instruction.end)
                told["look_back"] = instruction.look_back
                if instruction.first is not None:
                    _write_play(told, instruction.first)
            case Measure():
                told["groups"] = sent.groups
                told["trials"] = self._flat(instruction.trials)
            case Evaluate():
                _write_play(told, instruction.play)
        return RecordDict({"arrays": sent.record, "told": told})

    def read_instruction(self, kind: str, content: RecordDict) -> Instruction:
        """Of a message of this type; `Refused` if it is not one that a client can follow.

        `shared` is one object for all whose message has the same: it is not to be changed.
        """
        told_all = "commons" in content
        _expect(content, {"arrays", "told"} | ({"commons"} if told_all else set()))
        if told_all:
            self._refuse_others(content)
        arrays, told = _Fields(content, "arrays", ArrayRecord), _Fields(content, "told", ConfigRecord)
        run = told.take("run", str)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run):
            raise Refused(f"told.run is {_show(run)}; letters, digits, dots, - and _ name a folder here")
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
            raise Refused(f"a message of type {_show(kind)}; there are {TRAIN}, {MEASURE} and {EVALUATE}")
        arrays.end()
        told.end()
        return instruction

    def _refuse_others(self, content: RecordDict) -> None:
        """The message must be of these very commons."""
        fields = _Fields(content, "commons", ConfigRecord)
        blocks, digest = fields.take("blocks", str), fields.take("digest", str)
        fields.end()
        if digest != self._commons.digest:
            raise Refused(
                f"the server shares {_show(blocks)} in other shapes or groups than this client has them; they must be"
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
                _expect(content, {"measured"})
                fields = _Fields(content, "measured", MetricRecord)
                kl = fields.divergences("kl", len(instruction.trials))
                fields.end()
                return Measured(kl)
            case Evaluate():
                _expect(content, {"played"})
                return Evaluated(self._read_played(content))

    # Instructions

    def _arrays(self, shared: np.ndarray, candidate: np.ndarray | None) -> _Sent:
        """The arrays of an instruction; those that were written already if they still are the same."""
        key = id(shared), id(candidate)
        found = self._sent.pop(key, None)
        if found is not None and found.still_is(shared, candidate):
            self._sent[key] = found
            return found
        written = {"shared": _write(shared)}
        groups, part = b"", None
        if candidate is not None:
            chosen = self._groups.unlike(candidate, shared)
            groups, part = self._groups.pack(chosen), _write(self._groups.part(candidate, chosen))
            written["candidate"] = part
        copies = (shared.copy(), None if candidate is None else candidate.copy())
        sent = self._sent[key] = _Sent((shared, candidate), copies, ArrayRecord(written), groups)
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
        values = _read("arrays.shared", array, self._size)
        found = self._seen.pop(id(array.data), None)
        if found is None or found[0] is not array.data or not np.array_equal(values, found[1]):
            _refuse_unfinite("arrays.shared", values)
            found = array.data, values.copy()
        self._seen[id(array.data)] = found
        _forget(self._seen)
        return found[1]

    def _read_candidate(self, arrays: _Fields, told: _Fields, shared: np.ndarray) -> np.ndarray:
        """[S]."""
        chosen = self._groups.chosen("told.groups", told.take("groups", bytes))
        values = _read("arrays.candidate", arrays.take("candidate", Array), self._groups.count(chosen))
        _refuse_unfinite("arrays.candidate", values)
        return self._groups.put(values, chosen, shared)

    def _read_trials(self, told: _Fields) -> tuple[tuple[float, ...], ...]:
        """[M, B], each from 0 to 1."""
        flat, blocks = told.take("trials", list), self._blocks
        if not flat or not blocks or len(flat) % blocks or len(flat) > MOST_TRIALS * (blocks + 1) * blocks:
            raise Refused(f"told.trials has {len(flat)} entries; it has to be some trials of {blocks} blocks each")
        if not all(type(alpha) is float and 0 <= alpha <= 1 for alpha in flat):
            raise Refused(f"told.trials is {_show(flat)}; parts of a step are floats from 0 to 1")
        return tuple(tuple(flat[at : at + blocks]) for at in range(0, len(flat), blocks))

    def _read_play(self, told: _Fields) -> Play:
        return Play(told.count("number", 0, self._scenario.rounds), told.take("deterministic", bool))

    # Answers

    def _write_trained(self, shared: np.ndarray, trained: Trained) -> RecordDict:
        point = np.asarray(trained.point, np.float32)
        chosen = self._groups.unlike(point, shared)
        arrays = {"point": _write(self._groups.part(point, chosen))}
        if trained.fisher is not None:
            arrays["fisher"] = _write(trained.fisher)
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
        _expect(content, {"arrays", "sent", "learned", "metrics"} | ({"played"} if train.first else set()))
        arrays, sent = _Fields(content, "arrays", ArrayRecord), _Fields(content, "sent", ConfigRecord)
        point = self._read_point(arrays, sent, train.start.shared)
        fisher = self._read_fisher(arrays)
        arrays.end()
        sent.end()
        learned = _Fields(content, "learned", MetricRecord)
        steps = learned.count("steps", 0, self._most_steps)
        trained = Trained(
            point=point,
            steps=steps,
            episodes=learned.count("episodes", 0, steps),
            gain=learned.number("gain"),
            spread=learned.number("spread", 0),
            metrics=_read_metrics(content),
            fisher=fisher,
            kl=learned.divergences("kl", 1 + self._blocks) if train.look_back and learned.has("kl") else None,
            played=self._read_played(content) if train.first else None,
        )
        learned.end()
        return trained

    def _read_point(self, arrays: _Fields, sent: _Fields, shared: np.ndarray) -> np.ndarray:
        """[S]; what did not travel is as in the shared blocks."""
        chosen = self._groups.chosen("sent.groups", sent.take("groups", bytes))
        values = _read("arrays.point", arrays.take("point", Array), self._groups.count(chosen))
        with np.errstate(over="ignore", invalid="ignore"):
            away = values - self._groups.part(shared, chosen)
            distance, limit = math.sqrt(away @ away), FURTHEST * (1 + math.sqrt(shared @ shared))
        if not distance <= limit or distance == math.inf:
            _refuse_unfinite("arrays.point", values)
            raise Refused(f"arrays.point is {distance:.3g} from the shared blocks; {limit:.3g} is as far as it may be")
        return self._groups.put(values, chosen, shared)

    def _read_fisher(self, arrays: _Fields) -> np.ndarray | None:
        """[S], where the scenario needs it."""
        if not self._needs_fisher or (self._size == 0 and not arrays.has("fisher")):
            return None
        fisher = _read("arrays.fisher", arrays.take("fisher", Array), self._size).copy()
        _refuse_unfinite("arrays.fisher", fisher)
        if self._size and fisher.min() < 0:
            raise Refused(f"arrays.fisher is {fisher.min():.3g} at entry {fisher.argmin()}; it is a mean of squares")
        return fisher

    def _read_played(self, content: RecordDict) -> Played:
        settings, fields = self._scenario.evaluate, _Fields(content, "played", MetricRecord)
        least = fields.number("least")
        most = fields.number("most", least)
        slack = 1e-6 * max(1.0, abs(least), abs(most))
        played = Played(
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
            longest = self._commons.longest
        policies = 2 if scenario.personal.model else 1
        return scenario.steps + policies * scenario.rollout.num_envs * longest


@dataclass(frozen=True, eq=False)
class _Sent:
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


@final
class _Groups:
    """The groups of S columns, for what travels in parts."""

    def __init__(self, ids: np.ndarray, number: int) -> None:
        order = ids.argsort(kind="stable")
        self._ids, self._number = ids, number
        self._order = None if (order[1:] > order[:-1]).all() else order
        self._sizes = np.bincount(ids, minlength=number)
        self._firsts = self._sizes.cumsum() - self._sizes

    def unlike(self, vector: np.ndarray, other: np.ndarray) -> np.ndarray:
        """[G] bool: where two vectors [S] are not the same, bit for bit."""
        if not self._number:
            return np.zeros(0, bool)
        columns = vector.view(np.uint32) != other.view(np.uint32)
        columns = columns if self._order is None else columns[self._order]
        found: np.ndarray = np.logical_or.reduceat(columns, self._firsts)
        return found

    def part(self, vector: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """[S] -> the columns of the groups chosen [G], in their order."""
        return vector if chosen.all() else vector[chosen[self._ids]]

    def put(self, values: np.ndarray, chosen: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """The inverse of `part`: a vector [S] of its own, elsewhere as `rest` [S]."""
        if chosen.all():
            return values.copy()
        vector = rest.copy()
        vector[chosen[self._ids]] = values
        return vector

    def count(self, chosen: np.ndarray) -> int:
        """How many columns these groups have."""
        return int(self._sizes[chosen].sum())

    def mask(self, numbers: Iterable[int]) -> bytes:
        """Groups by number, as bits."""
        chosen = np.zeros(self._number, bool)
        chosen[list(numbers)] = True
        return self.pack(chosen)

    def pack(self, chosen: np.ndarray) -> bytes:
        """[G] bool, as bits, and one more that is 0: Flower counts no record of no bytes."""
        return np.packbits(np.append(chosen, False)).tobytes()

    def chosen(self, place: str, mask: bytes) -> np.ndarray:
        """The inverse of `pack`."""
        bits = np.unpackbits(np.frombuffer(mask, np.uint8)).astype(bool)
        if len(mask) != self._number // 8 + 1 or bits[self._number :].any():
            raise Refused(f"{place} is {_show(mask)}; it has to be a bit for each of {self._number} groups")
        return bits[: self._number]


@final
class _Fields:
    """The values of a record, to be taken one by one; none may be left."""

    def __init__(
        self, content: RecordDict, name: str, kind: type[ArrayRecord] | type[ConfigRecord] | type[MetricRecord]
    ) -> None:
        record = content[name]
        if not isinstance(record, kind):
            raise Refused(f"{name} is a {type(record).__name__}; it has to be a {kind.__name__}")
        self._name = name
        self._rest: dict[str, object] = dict(record)

    def has(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str, kind: type[Value]) -> Value:
        """Of exactly this type: to Python a bool is an int too."""
        if name not in self._rest:
            raise Refused(f"{self._name}.{name} is missing")
        value = self._rest.pop(name)
        if type(value) is not kind:
            raise Refused(f"{self._name}.{name} is {_show(value)}; it has to be a {kind.__name__}")
        return value

    def number(self, name: str, least: float = -LARGEST, most: float = LARGEST) -> float:
        """Finite, and from `least` to `most`."""
        value = self.take(name, float)
        if not (math.isfinite(value) and least <= value <= most):
            raise Refused(f"{self._name}.{name} is {value}; it has to be finite, from {least:g} to {most:g}")
        return value

    def count(self, name: str, least: int, most: int) -> int:
        value = self.take(name, int)
        if not least <= value <= most:
            raise Refused(f"{self._name}.{name} is {_show(value)}; it has to be from {least} to {most}")
        return value

    def divergences(self, name: str, number: int) -> tuple[float, ...]:
        """So many, finite, and 0 or more but for rounding."""
        values = self.take(name, list)
        if len(values) != number or not all(type(value) is float and -1e-6 <= value < math.inf for value in values):
            raise Refused(f"{self._name}.{name} is {_show(values)}; it has to be {number} finite floats, 0 or more")
        return tuple(values)

    def end(self) -> None:
        """Refuse what nobody has taken."""
        if self._rest:
            raise Refused(f"{self._name} has {_show(sorted(self._rest))}, which nobody asked for")


def _expect(content: RecordDict, names: set[str]) -> None:
    """Exactly these records."""
    if set(content) != names:
        raise Refused(f"the records are {_show(sorted(content))}; they have to be {', '.join(sorted(names))}")


def _write_play(told: ConfigRecord, play: Play) -> None:
    told["number"], told["deterministic"] = play.number, play.deterministic


def _write_played(played: Played) -> MetricRecord:
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
        raise Refused(f"metrics is a {type(record).__name__}; it has to be a MetricRecord")
    metrics: dict[str, float] = {}
    for name, value in record.items():
        if name not in METRICS:
            raise Refused(f"metrics has {_show(name)}, which a client does not tell")
        if not (isinstance(value, float) and abs(value) <= LARGEST):
            raise Refused(f"metrics.{name} is {_show(value)}; it has to be a finite float, at most {LARGEST:g} in size")
        metrics[name] = value
    return metrics


def _write(vector: np.ndarray) -> Array:
    """As `numpy.save` would, but with the one header that `_read` knows for its length, and need not parse."""
    vector = np.ascontiguousarray(vector, "<f4")
    return Array("float32", vector.shape, "numpy.ndarray", b"".join((_header(vector.size), vector.data)))


def _read(place: str, array: Array, size: int) -> np.ndarray:
    """[size] float32, a view that cannot be written to."""
    if (array.dtype, array.shape, array.stype) != ("float32", (size,), "numpy.ndarray"):
        has = f"{_show(array.dtype)} of shape {_show(array.shape)} as {_show(array.stype)}"
        raise Refused(f"{place} is {has}; it has to be float32 of shape ({size},) as numpy.ndarray")
    header, data = _header(size), array.data
    if type(data) is not bytes or len(data) != len(header) + 4 * size or not data.startswith(header):
        raise Refused(f"{place} says that it is float32 of shape ({size},), but its bytes are not")
    vector: np.ndarray = np.frombuffer(data, "<f4", offset=len(header))
    return vector


@lru_cache(maxsize=256)
def _header(size: int) -> bytes:
    """What numpy's format, version 1, has before the values of a vector."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size},), }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _refuse_unfinite(place: str, vector: np.ndarray) -> None:
    finite = np.isfinite(vector)
    if not finite.all():
        at = int(finite.argmin())
        raise Refused(f"{place} is {vector[at]} at entry {at}; it has to be finite")


def _forget(found: dict[Value, _Sent] | dict[Value, tuple[bytes, np.ndarray]]) -> None:
    """All but the latest."""
    while len(found) > KEPT:
        del found[next(iter(found))]


def _show(value: object) -> str:
    """Short, whatever it is that came in."""
    return reprlib.repr(value)
