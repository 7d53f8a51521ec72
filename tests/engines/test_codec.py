from __future__ import annotations

import dataclasses
import math
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grpo_fed.engines.wire import (
    Codec,
    Hello,
    InvalidMessageError,
    content_size,
    message_type,
    read_hello,
    read_shared_blocks,
    write_hello,
    write_shared_blocks,
)
from grpo_fed.engines.wire.codec import MAX_DISTANCE
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
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.metrics import REPORTED
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import TaskShape

TEXT = """
name = "wire"
rounds = 5
steps = 64
[policy]
hidden = [{hidden}]
{policy}
[rollout]
num_envs = 4
horizon = 16
[objective]
minibatches = 1
[proximity]
mode = "{mode}"
[evaluate]
episodes = 8
step_limit = 200
[[clients]]
name = "cart"
count = 2
env = "grpo_fed/CartPole-v1"
"""


ROWS = 'groups = { "torso.*" = "row" }'


def wire_of(mode: str = "quadratic", policy: str = ROWS, hidden: int = 3) -> Codec:
    scenario = Scenario.loads(TEXT.format(mode=mode, policy=policy, hidden=hidden))
    return Codec(resolve_shared_blocks(scenario), scenario)


WIRE = wire_of()
"""torso.0 in 3 rows of 4 weights and a bias, each a group; the actor of 2 x 3 weights and 2 biases is one."""
SIZE, GROUPS, BLOCKS = 23, 4, 2
SHARED = np.linspace(-1, 1, SIZE, dtype=np.float32)
START = Start("run-1", 2, SHARED, (1, 3))
PLAY = EvaluationPlan(1, deterministic=False)
PLAYED = EvaluationSummary(mean=20.0, std=3.0, least=15.0, most=26.0, episodes=8, length=20.0)
TRAIN = Train(START, 0.25, 0.5, measure_last_step=True, evaluate_first=PLAY)
MEASURE = Measure(START, SHARED + np.float32(0.5), ((1.0, 1.0), (0.25, 0.0), (0.0, 0.5)))
EVALUATE = Evaluate(START, PLAY)
TRAINED = Trained(
    point=SHARED * np.float32(1.5),
    steps=64,
    episodes=3,
    gain=-1.5,
    spread=2.0,
    metrics={"charts/episodic_return": 21.5, "losses/kl": 0.01},
    fisher=SHARED**2,
    kl=(0.03, 0.01, 0.02),
    played=PLAYED,
)
MEASURED = Measured((0.04, 0.01, -1e-9))
PAIRS: list[tuple[Instruction, Answer]] = [(TRAIN, TRAINED), (MEASURE, MEASURED), (EVALUATE, Evaluated(PLAYED))]
KINDS = ["train", "measure", "evaluate"]


def plain(value: Any) -> Any:
    """A record as something that == compares, arrays by their bits."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


# What goes through ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("instruction", "answer"), PAIRS, ids=KINDS)
def test_what_is_said_arrives_bit_for_bit_through_flowers_own_encoding(instruction: Instruction, answer: Answer):
    told = recorddict_from_proto(recorddict_to_proto(WIRE.write_instruction(instruction)))
    heard = wire_of().read_instruction(message_type(instruction), told)
    assert plain(heard) == plain(instruction)
    said = recorddict_from_proto(recorddict_to_proto(WIRE.write_answer(heard, answer)))
    assert plain(WIRE.read_answer(instruction, said)) == plain(answer)


def test_what_may_be_left_out_is_left_out():
    bare = wire_of(mode="off")
    train = Train(dataclasses.replace(START, departed=()), 0.0, 0.2)
    trained = dataclasses.replace(TRAINED, fisher=None, kl=None, played=None, metrics={})
    assert plain(bare.read_instruction("train", bare.write_instruction(train))) == plain(train)
    assert plain(bare.read_answer(train, bare.write_answer(train, trained))) == plain(trained)
    unmeasured = dataclasses.replace(TRAINED, kl=None)
    assert plain(WIRE.read_answer(TRAIN, WIRE.write_answer(TRAIN, unmeasured))) == plain(unmeasured)


def test_a_client_may_have_nothing_in_common_with_the_others():
    wire = wire_of(policy="shared = []")
    nothing = np.zeros(0, np.float32)
    train = Train(Start("alone", 1, nothing), 0.0, 0.2)
    for fisher in (None, nothing):
        trained = dataclasses.replace(TRAINED, point=nothing, fisher=fisher, kl=None, played=None)
        told = wire.read_instruction("train", wire.write_instruction(train))
        assert plain(told) == plain(train)
        assert plain(wire.read_answer(train, wire.write_answer(told, trained))) == plain(trained)


def test_a_zero_keeps_its_sign_and_the_smallest_number_its_value():
    point = SHARED.copy()
    point[:3] = -0.0, 1e-45, 3e38
    shared = np.zeros(SIZE, np.float32)
    shared[2] = 3e38
    train = dataclasses.replace(TRAIN, start=dataclasses.replace(START, shared=shared))
    trained = dataclasses.replace(TRAINED, point=point)
    with np.errstate(over="raise"):
        heard = WIRE.read_answer(train, WIRE.write_answer(train, trained))
    assert plain(heard) == plain(trained)


def test_flower_itself_can_read_the_arrays():
    said = WIRE.write_answer(TRAIN, TRAINED)
    np.testing.assert_array_equal(said["arrays"]["point"].numpy(), TRAINED.point)
    told = WIRE.write_instruction(TRAIN)
    np.testing.assert_array_equal(told["arrays"]["shared"].numpy(), SHARED)


def test_a_nodes_name_goes_through():
    for form in (None, TaskShape(4, "categorical", (2,), 500), TaskShape(1, "multi-categorical", (2, 3), 0)):
        assert read_hello(write_hello(Hello("cart-1", form))) == Hello("cart-1", form)
    with pytest.raises(InvalidMessageError, match=r"hello\.client is 1; it has to be a str"):
        read_hello(RecordDict({"hello": ConfigRecord({"client": 1})}))
    with pytest.raises(InvalidMessageError, match="the records are "):
        read_hello(RecordDict())


FORM = {"observation_size": 4, "kind": "categorical", "sizes": [2], "episode_limit": 500}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"observation_size": 0}, r"hello\.observation_size is 0; it has to be from 1 to 262144"),
        ({"observation_size": 2**18 + 1}, r"hello\.observation_size is 262145"),
        ({"observation_size": 4.0}, r"hello\.observation_size is 4\.0; it has to be a int"),
        ({"kind": "any"}, r"hello\.kind is 'any'; there are categorical, multi-categorical, gaussian"),
        ({"sizes": [2, 2]}, r"hello\.sizes is \[2, 2\]; they have to be what a categorical action has"),
        ({"sizes": [0]}, r"hello\.sizes is \[0\]"),
        ({"sizes": []}, r"hello\.sizes is \[\]"),
        ({"sizes": [2**18 + 1]}, r"hello\.sizes is \[262145\]"),
        ({"sizes": [2.0]}, r"hello\.sizes is \[2\.0\]"),
        ({"episode_limit": -1}, r"hello\.episode_limit is -1"),
        ({"more": 1}, r"hello has \['more'\], which nobody asked for"),
    ],
)
def test_a_task_that_cannot_be_is_refused(change: dict[str, Any], why: str):
    assert read_hello(RecordDict({"hello": ConfigRecord({"client": "cart", **FORM})})).shape is not None
    with pytest.raises(InvalidMessageError, match=why):
        read_hello(RecordDict({"hello": ConfigRecord({"client": "cart", **FORM, **change})}))


def test_a_client_is_told_what_is_shared_and_refuses_other_commons():
    commons = resolve_shared_blocks(Scenario.loads(TEXT.format(mode="quadratic", policy=ROWS, hidden=3)))
    content = WIRE.write_instruction(TRAIN)
    content["commons"] = write_shared_blocks(commons)
    assert read_shared_blocks(content) == ("torso.0", "actor")
    assert plain(WIRE.read_instruction("train", content)) == plain(TRAIN)
    for other in (wire_of(policy='groups = { "torso.*" = "column" }'), wire_of(hidden=4)):
        with pytest.raises(InvalidMessageError, match="in other shapes or groups than this client has them"):
            other.read_instruction("train", content)
    for text in ("torso.0", "{}", "[1]", "[" * 100_000):
        content["commons"]["blocks"] = text
        with pytest.raises(InvalidMessageError, match=r"commons\.blocks is .*; it has to be a JSON list of names"):
            read_shared_blocks(content)
    with pytest.raises(InvalidMessageError, match="commons is missing"):
        read_shared_blocks(WIRE.write_instruction(TRAIN))
    content["commons"]["more"] = 1
    with pytest.raises(InvalidMessageError, match="which nobody asked for"):
        WIRE.read_instruction("train", content)


# What it costs --------------------------------------------------------------------------------------------------------


def test_groups_that_did_not_change_are_not_sent():
    point = SHARED.copy()
    point[5] += 1  # the second row's first weight, which its bias goes with
    said = WIRE.write_answer(TRAIN, dataclasses.replace(TRAINED, point=point))
    np.testing.assert_array_equal(said["arrays"]["point"].numpy(), [*point[4:8], point[13]])
    assert plain(WIRE.read_answer(TRAIN, said)) == plain(dataclasses.replace(TRAINED, point=point))
    nowhere = WIRE.write_instruction(dataclasses.replace(MEASURE, candidate=SHARED.copy()))
    assert nowhere["arrays"]["candidate"].shape == (0,)
    assert plain(WIRE.read_instruction("query.measure", nowhere)) == plain(
        dataclasses.replace(MEASURE, candidate=SHARED)
    )


def test_bytes_are_counted_as_they_are():
    said = WIRE.write_answer(MEASURE, MEASURED)
    assert content_size(said) == len("kl") + 3 * 8
    told = WIRE.write_instruction(EVALUATE)
    array = len("shared") + 128 + 4 * SIZE  # numpy's header is 128 bytes
    settings = len("run" + "run-1" + "round" + "personal" + "number" + "deterministic") + 8 + 1 + 8 + 1
    assert content_size(told) == array + settings


def test_arrays_for_many_are_written_and_read_once():
    starts = [Start("run-1", 2, SHARED, (number,)) for number in range(3)]
    told = [WIRE.write_instruction(Train(start, 0, 1)) for start in starts]
    assert all(one["arrays"] is told[0]["arrays"] for one in told)
    client = wire_of()
    heard = [client.read_instruction("train", one) for one in told]
    assert all(one.start.shared is heard[0].start.shared for one in heard)
    assert [one.start.departed for one in heard] == [(0,), (1,), (2,)]
    candidate = SHARED + np.float32(1)
    both = [WIRE.write_instruction(Measure(start, candidate, ((1.0, 1.0),))) for start in starts]
    assert all(one["arrays"] is both[0]["arrays"] for one in both)


def test_an_array_that_was_written_to_since_is_written_anew():
    shared = SHARED.copy()
    start = dataclasses.replace(START, shared=shared)
    WIRE.write_instruction(Evaluate(start, PLAY))
    shared[0] = 7.0
    told = WIRE.write_instruction(Evaluate(start, PLAY))
    heard = WIRE.read_instruction("evaluate", told)
    assert heard.start.shared[0] == 7.0
    heard.start.shared[0] = 8.0  # whoever does this must not change what others read
    assert WIRE.read_instruction("evaluate", told).start.shared[0] == 7.0


def test_many_points_in_turn_are_each_read_as_they_are():
    points = [np.full(SIZE, number, np.float32) for number in range(20)]
    for _ in range(2):
        for number, point in enumerate(points):
            told = WIRE.write_instruction(Evaluate(dataclasses.replace(START, shared=point), PLAY))
            assert (WIRE.read_instruction("evaluate", told).start.shared == number).all()


def test_reading_an_answer_of_25_000_parameters_takes_less_than_a_third_of_a_millisecond():
    wire = wire_of(hidden=3571)
    shared = np.random.default_rng(0).normal(size=25_000 - 1).astype(np.float32)
    assert len(shared) == 7 * 3571 + 2
    train = Train(Start("run", 1, shared), 0, 1)
    said = wire.write_answer(
        train, dataclasses.replace(TRAINED, point=shared + np.float32(0.01), fisher=shared**2, kl=None, played=None)
    )
    assert min(timeit.repeat(lambda: wire.read_answer(train, said), number=1, repeat=200)) < 0.3e-3


# What is refused ------------------------------------------------------------------------------------------------------

Change = Callable[[RecordDict], object]


def put(record: str, **values: Any) -> Change:
    """Other values in a record."""
    return lambda content: content[record].update(values)


def array_of(values: Any, dtype: str = "<f4") -> Array:
    return Array(np.asarray(values, dtype))


def with_entry(value: float, place: int = 0) -> Array:
    point = TRAINED.point.copy()
    point[place] = value
    return array_of(point)


def forged(**fields: Any) -> Array:
    """The true point with fields that say something else."""
    true = WIRE.write_answer(TRAIN, TRAINED)["arrays"]["point"]
    return Array(**({"dtype": true.dtype, "shape": true.shape, "stype": true.stype, "data": true.data} | fields))


POINT = forged().data
FAR = MAX_DISTANCE * (1 + math.sqrt(float(SHARED @ SHARED)))

REFUSED: list[tuple[str, Instruction, Answer, Change, str]] = [
    ("nan", TRAIN, TRAINED, put("arrays", point=with_entry(math.nan)), r"arrays\.point is nan at entry 0"),
    ("inf", TRAIN, TRAINED, put("arrays", point=with_entry(-math.inf, 22)), r"arrays\.point is -inf at entry 22"),
    ("far", TRAIN, TRAINED, put("arrays", point=with_entry(1.01 * FAR)), r"from the shared blocks; .* as far as"),
    ("very far", TRAIN, TRAINED, put("arrays", point=with_entry(3e38)), r"inf from the shared blocks"),
    ("short", TRAIN, TRAINED, put("arrays", point=array_of(SHARED[1:])), r"has to be float32 of shape \(23,\)"),
    ("square", TRAIN, TRAINED, put("arrays", point=array_of(SHARED[None])), r"shape \(1, 23\)"),
    ("double", TRAIN, TRAINED, put("arrays", point=array_of(SHARED, "<f8")), r"'float64' of shape \(23,\)"),
    ("claims", TRAIN, TRAINED, put("arrays", point=forged(data=array_of(SHARED, "<f8").data)), "its bytes are not"),
    ("cut", TRAIN, TRAINED, put("arrays", point=forged(data=POINT[:-1])), "its bytes are not"),
    ("longer", TRAIN, TRAINED, put("arrays", point=forged(data=POINT + b"\0")), "its bytes are not"),
    ("other format", TRAIN, TRAINED, put("arrays", point=forged(stype="pickle")), "as 'pickle'; it has to be"),
    ("pickle", TRAIN, TRAINED, put("arrays", point=forged(data=b"\x80\x04]\x94." + POINT[5:])), "its bytes are not"),
    ("unknown array", TRAIN, TRAINED, put("arrays", critic=array_of([1.0])), r"arrays has \['critic'\]"),
    ("no point", TRAIN, TRAINED, lambda c: c["arrays"].pop("point"), r"arrays\.point is missing"),
    ("no fisher", TRAIN, TRAINED, lambda c: c["arrays"].pop("fisher"), r"arrays\.fisher is missing"),
    ("fisher < 0", TRAIN, TRAINED, put("arrays", fisher=array_of(-(SHARED**2))), r"fisher is -1 at entry 0"),
    ("fisher nan", TRAIN, TRAINED, put("arrays", fisher=with_entry(math.nan, 3)), r"fisher is nan at entry 3"),
    ("mask", TRAIN, TRAINED, put("sent", groups=b"\xff"), r"a bit for each of 4 groups"),
    ("long mask", TRAIN, TRAINED, put("sent", groups=b"\xf0\0"), r"a bit for each of 4 groups"),
    ("no mask", TRAIN, TRAINED, put("sent", groups=""), r"sent\.groups is ''; it has to be a bytes"),
    ("mask and point", TRAIN, TRAINED, put("sent", groups=b"\x70"), r"it has to be float32 of shape \(18,\)"),
    ("more steps", TRAIN, TRAINED, put("learned", steps=129), r"learned\.steps is 129; .* from 0 to 128"),
    ("less steps", TRAIN, TRAINED, put("learned", steps=-1), r"learned\.steps is -1"),
    ("part of a step", TRAIN, TRAINED, put("learned", steps=64.0), r"learned\.steps is 64\.0; it has to be a int"),
    ("episodes", TRAIN, TRAINED, put("learned", episodes=65), r"learned\.episodes is 65; .* from 0 to 64"),
    ("gain", TRAIN, TRAINED, put("learned", gain=math.nan), r"learned\.gain is nan"),
    ("spread", TRAIN, TRAINED, put("learned", spread=-0.1), r"learned\.spread is -0\.1; .* from 0 to 1e\+100"),
    ("great gain", TRAIN, TRAINED, put("learned", gain=-1.7e308), r"learned\.gain is -1\.7e\+308; .* from -1e\+100"),
    ("kl nan", TRAIN, TRAINED, put("learned", kl=[0.0, math.nan, 0.0]), r"learned\.kl .* 3 finite floats, 0 or more"),
    ("kl inf", TRAIN, TRAINED, put("learned", kl=[0.0, math.inf, 0.0]), r"learned\.kl .* 3 finite floats"),
    ("kl < 0", TRAIN, TRAINED, put("learned", kl=[0.0, -0.01, 0.0]), r"learned\.kl .* 3 finite floats"),
    ("two kl", TRAIN, TRAINED, put("learned", kl=[0.0, 0.0]), r"learned\.kl .* 3 finite floats"),
    (
        "kl unasked",
        dataclasses.replace(TRAIN, measure_last_step=False),
        TRAINED,
        put("learned"),
        r"learned has \['kl'\]",
    ),
    ("played unasked", dataclasses.replace(TRAIN, evaluate_first=None), TRAINED, put("learned"), "the records are "),
    ("not played", TRAIN, dataclasses.replace(TRAINED, played=None), put("learned"), "the records are "),
    ("metric", TRAIN, TRAINED, put("metrics", host=1.0), r"metrics has 'host', which a client does not tell"),
    ("metric inf", TRAIN, TRAINED, put("metrics", **{"losses/kl": math.inf}), r"metrics\.losses/kl is inf"),
    ("great metric", TRAIN, TRAINED, put("metrics", **{"losses/kl": 1.7e308}), r"losses/kl is 1\.7e\+308; .* 1e\+100"),
    ("metric list", TRAIN, TRAINED, put("metrics", **{"losses/kl": [0.1]}), r"metrics\.losses/kl is \[0\.1\]"),
    ("metric int", TRAIN, TRAINED, put("metrics", **{"losses/kl": 1}), r"metrics\.losses/kl is 1;"),
    ("no metrics", TRAIN, TRAINED, lambda c: c.pop("metrics"), "the records are "),
    ("wrong record", TRAIN, TRAINED, lambda c: c.update(learned=ConfigRecord()), "learned is a ConfigRecord"),
    ("wrong metrics", TRAIN, TRAINED, lambda c: c.update(metrics=ConfigRecord()), "metrics is a ConfigRecord"),
    ("too good", TRAIN, TRAINED, put("played", mean=27.0), r"played\.mean is 27\.0; .* from 15 to 26"),
    ("great return", TRAIN, TRAINED, put("played", mean=1.7e308, most=1.7e308), r"played\.most is 1\.7e\+308"),
    ("too wide", TRAIN, TRAINED, put("played", std=12.0), r"played\.std is 12\.0"),
    ("upside down", TRAIN, TRAINED, put("played", most=14.0), r"played\.most is 14\.0"),
    ("too many", TRAIN, TRAINED, put("played", episodes=9), r"played\.episodes is 9; .* from 1 to 8"),
    ("too long", TRAIN, TRAINED, put("played", length=201.0), r"played\.length is 201\.0"),
    ("one kl", MEASURE, MEASURED, put("measured", kl=[0.1]), r"measured\.kl is \[0\.1\]; it has to be 3 finite floats"),
    ("no kl", MEASURE, MEASURED, lambda c: c["measured"].pop("kl"), r"measured\.kl is missing"),
    ("more", MEASURE, MEASURED, put("measured", states=3), r"measured has \['states'\], which nobody asked for"),
    ("other answer", EVALUATE, MEASURED, put("measured"), r"the records are \['measured'\]; they have to be played"),
]


@pytest.mark.parametrize(
    ("instruction", "answer", "change", "why"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_an_answer_that_cannot_be_true_is_refused(instruction: Instruction, answer: Answer, change: Change, why: str):
    said = WIRE.write_answer(instruction, answer)
    change(said)
    with pytest.raises(InvalidMessageError, match=why) as refused:
        WIRE.read_answer(instruction, said)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("value", [math.inf, math.nan, 2e38])
def test_shared_blocks_beyond_all_measure_let_nothing_pass(value: float):
    shared = np.full(SIZE, 1e38, np.float32)
    train = dataclasses.replace(TRAIN, start=dataclasses.replace(START, shared=shared))
    said = WIRE.write_answer(train, dataclasses.replace(TRAINED, point=np.full(SIZE, value, np.float32)))
    with pytest.raises(InvalidMessageError, match=r"arrays\.point is"):
        WIRE.read_answer(train, said)


def test_fisher_information_that_nobody_needs_is_refused():
    wire = wire_of(mode="off")
    with pytest.raises(InvalidMessageError, match=r"arrays has \['fisher'\]"):
        wire.read_answer(TRAIN, wire.write_answer(TRAIN, TRAINED))


def test_a_client_with_two_policies_and_one_with_whole_episodes_may_take_more_steps():
    for settings_, most in (
        ("[personal]\nmodel = true\n", 64 * 3 + 64),
        ('[objective]\nadvantage = "group"\n[group]\nsize = 2\nby = "task"\n[rollout]\nnum_envs=4\n', 64 + 4 * 500),
    ):
        text = 'name = "w"\nsteps = {steps}\n' + settings_
        rest = '[[clients]]\nname = "cart"\nenv = "grpo_fed/CartPole-v1"\n'
        if "personal" in settings_:
            text = text.format(steps=128) + "[rollout]\nnum_envs = 4\nhorizon = 16\n[objective]\nminibatches = 1\n"
        scenario = Scenario.loads(text.format(steps=64) + rest)
        commons = resolve_shared_blocks(scenario)
        wire, train = Codec(commons, scenario), Train(Start("run", 1, commons.initial.numpy()), 0, 1)
        trained = Trained(commons.initial.numpy() + 1, most, 0, 0.0, 0.0, {})
        assert wire.read_answer(train, wire.write_answer(train, trained)).steps == most
        more = wire.write_answer(train, dataclasses.replace(trained, steps=most + 1))
        with pytest.raises(InvalidMessageError, match=f"from 0 to {most}"):
            wire.read_answer(train, more)


INSTRUCTIONS: list[tuple[str, Instruction, Change, str]] = [
    ("elsewhere", TRAIN, put("told", run="../other"), r"told\.run is '\.\./other'; letters"),
    ("hidden", TRAIN, put("told", run=".ssh"), r"told\.run is '\.ssh'"),
    ("newline", TRAIN, put("told", run="run\n"), r"told\.run is"),
    ("round 0", TRAIN, put("told", round=0), r"told\.round is 0; it has to be from 1 to 5"),
    ("round 6", EVALUATE, put("told", round=6), r"told\.round is 6; it has to be from 0 to 5"),
    ("groups", TRAIN, put("told", personal=b""), r"told\.personal is b''; it has to be a bit for each"),
    ("backwards", TRAIN, put("told", end=0.1), r"told\.end is 0\.1; .* from 0\.25 to 1"),
    ("play", TRAIN, lambda c: c["told"].pop("deterministic"), r"told\.deterministic is missing"),
    ("plays", TRAIN, put("told", number=-1), r"told\.number is -1"),
    ("unknown", TRAIN, put("told", noise=0.1), r"told has \['noise'\]"),
    ("nan", TRAIN, put("arrays", shared=with_entry(math.nan)), r"arrays\.shared is nan at entry 0"),
    ("candidate", MEASURE, put("arrays", candidate=with_entry(math.inf)), r"arrays\.candidate is inf at entry 0"),
    ("two arrays", TRAIN, put("arrays", candidate=array_of(SHARED)), r"arrays has \['candidate'\]"),
    ("part of a trial", MEASURE, put("told", trials=[1.0]), r"told\.trials has 1 entries"),
    ("no trial", MEASURE, put("told", trials=[]), r"told\.trials has 0 entries"),
    ("many trials", MEASURE, put("told", trials=[1.0] * 2000), r"told\.trials has 2000 entries"),
    ("too far", MEASURE, put("told", trials=[1.0, 1.5]), r"parts of a step are floats from 0 to 1"),
    ("no arrays", TRAIN, lambda c: c.pop("arrays"), "the records are "),
]


@pytest.mark.parametrize(
    ("instruction", "change", "why"), [row[1:] for row in INSTRUCTIONS], ids=[row[0] for row in INSTRUCTIONS]
)
def test_a_client_follows_no_instruction_that_makes_no_sense(instruction: Instruction, change: Change, why: str):
    told = recorddict_from_proto(recorddict_to_proto(WIRE.write_instruction(instruction)))
    change(told)
    with pytest.raises(InvalidMessageError, match=why):
        WIRE.read_instruction(message_type(instruction), told)


def test_a_client_follows_no_instruction_of_another_type():
    for kind in ("train", "evaluate", "query.hello"):
        with pytest.raises(InvalidMessageError):
            WIRE.read_instruction(kind, WIRE.write_instruction(MEASURE))


# Whatever may come in -------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 64, 10**30, 0.0, -0.5, 1e300, 5e-324, math.nan, math.inf, -math.inf]
LISTS = [[], [1], [0.1], [0.1, 0.2, 0.3], [math.nan] * 3, [-1.0] * 3, [0.0] * 64]
WORDS = ["", "point", "../x", b"", b"\xff", b"\xf0", b"\x40", True, False]
NAMES = [*REPORTED, "point", "fisher", "kl", "steps", "groups", "told", "x"]
RECORDS = [ArrayRecord(), ConfigRecord(), MetricRecord()]


def damage(draw: st.DrawFn, content: RecordDict) -> None:
    """Change one thing, anywhere."""
    name = draw(st.sampled_from([*sorted(content), "x"]))
    action = draw(st.sampled_from(["drop", "replace", *["inside"] * 8]))
    record = content.get(name)
    if record is None or action == "replace":
        content[name] = draw(st.sampled_from(RECORDS)).copy()
    elif action == "drop":
        del content[name]
    elif action == "inside":
        key = draw(st.sampled_from(sorted(record) * 4 + NAMES))
        if key in record and draw(st.integers(0, 5)) == 0:
            del record[key]
        elif isinstance(record, ArrayRecord):
            record[key] = damaged(draw, record.get(key))
        else:
            record[key] = draw(st.sampled_from(NUMBERS + LISTS + (WORDS if isinstance(record, ConfigRecord) else [])))


def damaged(draw: st.DrawFn, array: Array | None) -> Array:
    if array is None:
        return array_of(draw(st.sampled_from([SHARED, SHARED[:5], np.zeros(0)])))
    dtype, shape, stype, data = array.dtype, array.shape, array.stype, bytearray(array.data)
    match draw(st.sampled_from(["dtype", "shape", "stype", "cut", "add", "byte", "entry"])):
        case "dtype":
            dtype = draw(st.sampled_from(["float64", "object", "int32"]))
        case "shape":
            shape = draw(st.sampled_from([(), (1,), (SIZE, 1), (10**9,), (-1,)]))
        case "stype":
            stype = "torch"
        case "cut":
            data = data[: draw(st.integers(0, len(data)))]
        case "add":
            data += b"\0\0\0\0"
        case "byte":
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        case "entry" if len(data) > 128:
            place = draw(st.integers(0, (len(data) - 128) // 4 - 1))
            value = draw(st.sampled_from([math.nan, math.inf, 0.0, 1e20, 3e38, 600.0, 0.5]))
            data[128 + 4 * place : 132 + 4 * place] = np.float32(value).tobytes()
    return Array(dtype, shape, stype, bytes(data))


@st.composite
def damages(draw: st.DrawFn) -> tuple[Instruction, RecordDict]:
    instruction, answer = draw(st.sampled_from(PAIRS))
    content = recorddict_from_proto(recorddict_to_proto(WIRE.write_answer(instruction, answer)))
    for _ in range(draw(st.integers(1, 2))):
        damage(draw, content)
    return instruction, content


@settings(max_examples=500)
@given(damages())
@example((TRAIN, WIRE.write_answer(TRAIN, TRAINED)))
def test_a_damaged_answer_is_refused_or_one_that_could_have_been_given(damaged: tuple[Instruction, RecordDict]):
    instruction, content = damaged
    try:
        answer = WIRE.read_answer(instruction, content)
    except InvalidMessageError:
        return
    assert_believable(instruction, answer)
    again = WIRE.read_answer(instruction, WIRE.write_answer(instruction, answer))
    assert plain(again) == plain(answer)


def assert_believable(instruction: Instruction, answer: Answer) -> None:
    """What the server relies on, said a second time and in other words."""
    match instruction, answer:
        case Train(), Trained():
            for vector in (answer.point, answer.fisher):
                assert vector is not None
                assert (vector.dtype, vector.shape) == (np.float32, (SIZE,))
                assert all(math.isfinite(value) for value in vector.tolist())
                vector[0] += 0  # it is the server's own
            distance = math.dist(answer.point.tolist(), SHARED.tolist())
            assert distance <= 1.0001 * 100 * (1 + math.hypot(*SHARED.tolist()))
            assert min(answer.fisher.tolist()) >= 0
            assert 0 <= answer.episodes <= answer.steps <= 128
            assert math.isfinite(answer.gain)
            assert 0 <= answer.spread < math.inf
            assert set(answer.metrics) <= REPORTED
            assert all(math.isfinite(value) for value in answer.metrics.values())
            assert answer.kl is None or (len(answer.kl) == 1 + BLOCKS and all(-1e-6 <= kl < 1e308 for kl in answer.kl))
            assert_played(answer.played)
        case Measure(), Measured():
            assert len(answer.kl) == len(instruction.fractions)
            assert all(-1e-6 <= kl < math.inf for kl in answer.kl)
        case Evaluate(), Evaluated():
            assert_played(answer.played)
        case _:
            raise AssertionError(f"{answer} to {instruction}")


def assert_played(played: EvaluationSummary | None) -> None:
    assert played is not None
    assert played.least - 1e-3 <= played.mean <= played.most + 1e-3 or abs(played.most) > 100
    assert all(math.isfinite(value) for value in dataclasses.astuple(played))
    assert 1 <= played.episodes <= 8
    assert 0 <= played.length <= 200
    assert played.std >= 0


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_instruction_is_refused_or_one_that_could_have_been_given(data: st.DataObject):
    instruction, _ = data.draw(st.sampled_from(PAIRS))
    content = recorddict_from_proto(recorddict_to_proto(WIRE.write_instruction(instruction)))
    damage(data.draw, content)
    try:
        heard = WIRE.read_instruction(message_type(instruction), content)
    except InvalidMessageError:
        return
    again = WIRE.read_instruction(message_type(heard), WIRE.write_instruction(heard))
    assert plain(again) == plain(heard)
    assert type(heard) is type(instruction)
    assert 0 <= heard.start.round <= 5
    assert "/" not in heard.start.run
    assert set(heard.start.departed) <= set(range(GROUPS))
    assert np.isfinite(heard.start.shared).all()
