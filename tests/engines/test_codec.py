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
    InvalidMessageError,
    content_size,
    message_type,
    read_shared_blocks,
    write_shared_blocks,
)
from grpo_fed.engines.wire.answers import MAX_DISTANCE
from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationPlan,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    SharingComparison,
    Start,
    Train,
    Trained,
)
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.metrics import REPORTED, is_reported
from grpo_fed.scenario.scenario import Scenario

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


def make_codec(mode: str = "quadratic", policy: str = ROWS, hidden: int = 3) -> Codec:
    scenario = Scenario.loads(TEXT.format(mode=mode, policy=policy, hidden=hidden))
    return Codec(resolve_shared_blocks(scenario), scenario)


CODEC = make_codec()
"""torso.0 in 3 rows of 4 weights and a bias, each a group; the actor of 2 x 3 weights and 2 biases is one."""
SIZE, GROUPS, BLOCKS = 23, 4, 2
SHARED = np.linspace(-1, 1, SIZE, dtype=np.float32)
START = Start("run-1", 2, SHARED, (1, 3))
PLAN = EvaluationPlan(1, deterministic=False)
SUMMARY = EvaluationSummary(mean=20.0, std=3.0, least=15.0, most=26.0, episodes=8, length=20.0)
TRAIN = Train(START, 0.25, 0.5, measure_last_step=True, evaluate_first=PLAN, compare=(0, 2), rate=0.5)
COMPARISON = SharingComparison(own=31.5, shared=12.0, error=2.5, learned=14.0, episodes=32, shares=False, is_open=True)
MEASURE = Measure(START, SHARED + np.float32(0.5), ((1.0, 1.0), (0.25, 0.0), (0.0, 0.5)))
EVALUATE = Evaluate(START, PLAN)
TRAINED = Trained(
    point=SHARED * np.float32(1.5),
    steps=64,
    episodes=3,
    gain=-1.5,
    spread=2.0,
    metrics={"charts/episodic_return": 21.5, "losses/kl": 0.01, "penalty/zeros": 0.25, "penalty_norm/torso.0": 1.5},
    fisher=SHARED**2,
    kl=(0.03, 0.01, 0.02),
    evaluation=SUMMARY,
    low=True,
    comparison=COMPARISON,
)
MEASURED = Measured((0.04, 0.01, -1e-9))
PAIRS: list[tuple[Instruction, Answer]] = [(TRAIN, TRAINED), (MEASURE, MEASURED), (EVALUATE, Evaluated(SUMMARY))]
KINDS = ["train", "measure", "evaluate"]


def plain(value: Any) -> Any:
    """Turn a record into something that == compares, arrays by their bits."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("instruction", "answer"), PAIRS, ids=KINDS)
def test_messages_survive_flowers_own_encoding_bit_for_bit(instruction: Instruction, answer: Answer):
    request = recorddict_from_proto(recorddict_to_proto(CODEC.write_instruction(instruction)))
    decoded = make_codec().read_instruction(message_type(instruction), request)
    assert plain(decoded) == plain(instruction)
    reply = recorddict_from_proto(recorddict_to_proto(CODEC.write_answer(decoded, answer)))
    assert plain(CODEC.read_answer(instruction, reply)) == plain(answer)


def test_optional_fields_may_be_left_out():
    bare = make_codec(mode="off")
    train = Train(dataclasses.replace(START, departed=()), 0.0, 0.2)
    trained = dataclasses.replace(TRAINED, fisher=None, kl=None, evaluation=None, comparison=None, metrics={})
    assert plain(bare.read_instruction("train", bare.write_instruction(train))) == plain(train)
    assert plain(bare.read_answer(train, bare.write_answer(train, trained))) == plain(trained)
    unmeasured = dataclasses.replace(TRAINED, kl=None)
    assert plain(CODEC.read_answer(TRAIN, CODEC.write_answer(TRAIN, unmeasured))) == plain(unmeasured)


def test_clients_may_share_no_block():
    codec = make_codec(policy="shared = []")
    nothing = np.zeros(0, np.float32)
    train = Train(Start("alone", 1, nothing), 0.0, 0.2)
    for fisher in (None, nothing):
        trained = dataclasses.replace(TRAINED, point=nothing, fisher=fisher, kl=None, evaluation=None, comparison=None)
        request = codec.read_instruction("train", codec.write_instruction(train))
        assert plain(request) == plain(train)
        assert plain(codec.read_answer(train, codec.write_answer(request, trained))) == plain(trained)


def test_negative_zero_and_the_smallest_number_keep_their_bits():
    point = SHARED.copy()
    point[:3] = -0.0, 1e-45, 3e38
    shared = np.zeros(SIZE, np.float32)
    shared[2] = 3e38
    train = dataclasses.replace(TRAIN, start=dataclasses.replace(START, shared=shared))
    trained = dataclasses.replace(TRAINED, point=point)
    with np.errstate(over="raise"):
        decoded = CODEC.read_answer(train, CODEC.write_answer(train, trained))
    assert plain(decoded) == plain(trained)


def test_flower_can_decode_the_arrays():
    reply = CODEC.write_answer(TRAIN, TRAINED)
    np.testing.assert_array_equal(reply["arrays"]["point"].numpy(), TRAINED.point)
    request = CODEC.write_instruction(TRAIN)
    np.testing.assert_array_equal(request["arrays"]["shared"].numpy(), SHARED)


def test_a_client_refuses_shared_blocks_that_are_not_its_own():
    shared_blocks = resolve_shared_blocks(Scenario.loads(TEXT.format(mode="quadratic", policy=ROWS, hidden=3)))
    content = CODEC.write_instruction(TRAIN)
    content["shared_blocks"] = write_shared_blocks(shared_blocks)
    assert read_shared_blocks(content) == ("torso.0", "actor")
    assert plain(CODEC.read_instruction("train", content)) == plain(TRAIN)
    for other in (make_codec(policy='groups = { "torso.*" = "column" }'), make_codec(hidden=4)):
        with pytest.raises(InvalidMessageError, match="in other shapes or groups than this client has them"):
            other.read_instruction("train", content)
    for text in ("torso.0", "{}", "[1]", "[" * 100_000):
        content["shared_blocks"]["blocks"] = text
        with pytest.raises(InvalidMessageError, match=r"shared_blocks\.blocks is .*; .* a JSON list of names"):
            read_shared_blocks(content)
    with pytest.raises(InvalidMessageError, match="shared_blocks is missing"):
        read_shared_blocks(CODEC.write_instruction(TRAIN))
    content["shared_blocks"]["more"] = 1
    with pytest.raises(InvalidMessageError, match="which is not part of this message"):
        CODEC.read_instruction("train", content)


# Cost -----------------------------------------------------------------------------------------------------------------


def test_unchanged_groups_are_not_sent():
    point = SHARED.copy()
    point[5] += 1  # the second row's first weight, which its bias goes with
    reply = CODEC.write_answer(TRAIN, dataclasses.replace(TRAINED, point=point))
    np.testing.assert_array_equal(reply["arrays"]["point"].numpy(), [*point[4:8], point[13]])
    assert plain(CODEC.read_answer(TRAIN, reply)) == plain(dataclasses.replace(TRAINED, point=point))
    nowhere = CODEC.write_instruction(dataclasses.replace(MEASURE, candidate=SHARED.copy()))
    assert nowhere["arrays"]["candidate"].shape == (0,)
    assert plain(CODEC.read_instruction("query.measure", nowhere)) == plain(
        dataclasses.replace(MEASURE, candidate=SHARED)
    )


def test_content_size_counts_every_byte():
    reply = CODEC.write_answer(MEASURE, MEASURED)
    assert content_size(reply) == len("kl") + 3 * 8
    request = CODEC.write_instruction(EVALUATE)
    array = len("shared") + 128 + 4 * SIZE  # numpy's header is 128 bytes
    settings = len("run" + "run-1" + "round" + "departed" + "number" + "deterministic") + 8 + 1 + 8 + 1
    assert content_size(request) == array + settings


def test_arrays_for_many_clients_are_encoded_and_decoded_once():
    starts = [Start("run-1", 2, SHARED, (number,)) for number in range(3)]
    requests = [CODEC.write_instruction(Train(start, 0, 1)) for start in starts]
    assert all(content["arrays"] is requests[0]["arrays"] for content in requests)
    client = make_codec()
    decoded = [client.read_instruction("train", content) for content in requests]
    assert all(instruction.start.shared is decoded[0].start.shared for instruction in decoded)
    assert [instruction.start.departed for instruction in decoded] == [(0,), (1,), (2,)]
    candidate = SHARED + np.float32(1)
    both = [CODEC.write_instruction(Measure(start, candidate, ((1.0, 1.0),))) for start in starts]
    assert all(content["arrays"] is both[0]["arrays"] for content in both)


def test_an_array_that_was_written_to_is_encoded_again():
    shared = SHARED.copy()
    start = dataclasses.replace(START, shared=shared)
    CODEC.write_instruction(Evaluate(start, PLAN))
    shared[0] = 7.0
    request = CODEC.write_instruction(Evaluate(start, PLAN))
    decoded = CODEC.read_instruction("evaluate", request)
    assert decoded.start.shared[0] == 7.0
    with pytest.raises(ValueError, match="read-only"):
        decoded.start.shared[0] = 8.0  # others read the same object
    assert CODEC.read_instruction("evaluate", request).start.shared[0] == 7.0


def test_vectors_that_alternate_are_not_confused():
    points = [np.full(SIZE, number, np.float32) for number in range(20)]
    for _ in range(2):
        for number, point in enumerate(points):
            request = CODEC.write_instruction(Evaluate(dataclasses.replace(START, shared=point), PLAN))
            assert (CODEC.read_instruction("evaluate", request).start.shared == number).all()


def test_an_answer_of_25_000_parameters_is_decoded_within_0_3_ms():
    codec = make_codec(hidden=3571)
    shared = np.random.default_rng(0).normal(size=25_000 - 1).astype(np.float32)
    assert len(shared) == 7 * 3571 + 2
    train = Train(Start("run", 1, shared), 0, 1)
    reply = codec.write_answer(
        train,
        dataclasses.replace(
            TRAINED, point=shared + np.float32(0.01), fisher=shared**2, kl=None, evaluation=None, comparison=None
        ),
    )
    assert min(timeit.repeat(lambda: codec.read_answer(train, reply), number=1, repeat=200)) < 0.3e-3


# Refusals -------------------------------------------------------------------------------------------------------------

Change = Callable[[RecordDict], object]


def put(record: str, **values: Any) -> Change:
    """Other values in a record."""
    return lambda content: content[record].update(values)


def array_of(values: Any, dtype: str = "<f4") -> Array:
    return Array(np.asarray(values, dtype))


def with_entry(value: float, entry: int = 0) -> Array:
    point = TRAINED.point.copy()
    point[entry] = value
    return array_of(point)


def forged(**fields: Any) -> Array:
    """The array of a true point, with other fields."""
    true = CODEC.write_answer(TRAIN, TRAINED)["arrays"]["point"]
    return Array(**({"dtype": true.dtype, "shape": true.shape, "stype": true.stype, "data": true.data} | fields))


POINT = forged().data
FAR = MAX_DISTANCE * (1 + math.sqrt(float(SHARED @ SHARED)))

REFUSED: list[tuple[str, Instruction, Answer, Change, str]] = [
    ("nan", TRAIN, TRAINED, put("arrays", point=with_entry(math.nan)), r"arrays\.point is nan at entry 0"),
    ("inf", TRAIN, TRAINED, put("arrays", point=with_entry(-math.inf, 22)), r"arrays\.point is -inf at entry 22"),
    ("far", TRAIN, TRAINED, put("arrays", point=with_entry(1.01 * FAR)), r"from the shared blocks; .* be within"),
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
    ("mask", TRAIN, TRAINED, put("selection", groups=b"\xff"), r"a bit for each of 4 groups"),
    ("long mask", TRAIN, TRAINED, put("selection", groups=b"\xf0\0"), r"a bit for each of 4 groups"),
    ("no mask", TRAIN, TRAINED, put("selection", groups=""), r"selection\.groups is ''; it has to be a bytes"),
    ("mask and point", TRAIN, TRAINED, put("selection", groups=b"\x70"), r"it has to be float32 of shape \(18,\)"),
    ("more steps", TRAIN, TRAINED, put("training", steps=65), r"training\.steps is 65; .* from 0 to 64"),
    ("less steps", TRAIN, TRAINED, put("training", steps=-1), r"training\.steps is -1"),
    ("part of a step", TRAIN, TRAINED, put("training", steps=64.0), r"training\.steps is 64\.0; it has to be a int"),
    ("episodes", TRAIN, TRAINED, put("training", episodes=65), r"training\.episodes is 65; .* from 0 to 64"),
    ("gain", TRAIN, TRAINED, put("training", gain=math.nan), r"training\.gain is nan"),
    ("spread", TRAIN, TRAINED, put("training", spread=-0.1), r"training\.spread is -0\.1; .* from 0 to 1e\+100"),
    ("great gain", TRAIN, TRAINED, put("training", gain=-1.7e308), r"training\.gain is -1\.7e\+308; .* from -1e\+100"),
    ("kl nan", TRAIN, TRAINED, put("training", kl=[0.0, math.nan, 0.0]), r"training\.kl .* 3 finite floats, 0 or more"),
    ("kl inf", TRAIN, TRAINED, put("training", kl=[0.0, math.inf, 0.0]), r"training\.kl .* 3 finite floats"),
    ("kl < 0", TRAIN, TRAINED, put("training", kl=[0.0, -0.01, 0.0]), r"training\.kl .* 3 finite floats"),
    ("two kl", TRAIN, TRAINED, put("training", kl=[0.0, 0.0]), r"training\.kl .* 3 finite floats"),
    (
        "kl unasked",
        dataclasses.replace(TRAIN, measure_last_step=False),
        TRAINED,
        put("training"),
        r"training has \['kl'\]",
    ),
    ("played unasked", dataclasses.replace(TRAIN, evaluate_first=None), TRAINED, put("training"), "the records are "),
    ("not played", TRAIN, dataclasses.replace(TRAINED, evaluation=None), put("training"), "the records are "),
    ("low", TRAIN, TRAINED, put("training", low=2), r"training\.low is 2; .* from 0 to 1"),
    ("compared nan", TRAIN, TRAINED, put("comparison", own=math.nan), r"comparison\.own is nan"),
    ("compared much", TRAIN, TRAINED, put("comparison", episodes=129), r"comparison\.episodes is 129; .* 2 to 128"),
    ("compared error", TRAIN, TRAINED, put("comparison", error=-1.0), r"comparison\.error is -1"),
    ("shares", TRAIN, TRAINED, put("comparison", shares=2), r"comparison\.shares is 2"),
    ("compared more", TRAIN, TRAINED, put("comparison", worse=1.0), r"comparison has \['worse'\]"),
    ("compared unasked", dataclasses.replace(TRAIN, compare=()), TRAINED, put("training"), "the records are "),
    ("metric", TRAIN, TRAINED, put("metrics", host=1.0), r"metrics has 'host', which clients may not report"),
    ("a family", TRAIN, TRAINED, put("metrics", **{"penalty_norm/": 1.0}), r"metrics has 'penalty_norm/', which"),
    ("bad name", TRAIN, TRAINED, put("metrics", **{"penalty_norm/<b>": 1.0}), r"has 'penalty_norm/<b>', which clients"),
    (
        "many metrics",
        TRAIN,
        TRAINED,
        put("metrics", **{f"penalty_norm/{block}": 1.0 for block in range(10_001)}),
        r"metrics has 100\d\d numbers; at most 10000",
    ),
    ("metric inf", TRAIN, TRAINED, put("metrics", **{"losses/kl": math.inf}), r"metrics\.losses/kl is inf"),
    ("great metric", TRAIN, TRAINED, put("metrics", **{"losses/kl": 1.7e308}), r"losses/kl is 1\.7e\+308; .* 1e\+100"),
    ("metric list", TRAIN, TRAINED, put("metrics", **{"losses/kl": [0.1]}), r"metrics\.losses/kl is \[0\.1\]"),
    ("metric int", TRAIN, TRAINED, put("metrics", **{"losses/kl": 1}), r"metrics\.losses/kl is 1;"),
    ("no metrics", TRAIN, TRAINED, lambda c: c.pop("metrics"), "the records are "),
    ("wrong record", TRAIN, TRAINED, lambda c: c.update(training=ConfigRecord()), "training is a ConfigRecord"),
    ("wrong metrics", TRAIN, TRAINED, lambda c: c.update(metrics=ConfigRecord()), "metrics is a ConfigRecord"),
    ("too good", TRAIN, TRAINED, put("evaluation", mean=27.0), r"evaluation\.mean is 27\.0; .* from 15 to 26"),
    ("great return", TRAIN, TRAINED, put("evaluation", mean=1.7e308, most=1.7e308), r"evaluation\.most is 1\.7e\+308"),
    ("too wide", TRAIN, TRAINED, put("evaluation", std=12.0), r"evaluation\.std is 12\.0"),
    ("upside down", TRAIN, TRAINED, put("evaluation", most=14.0), r"evaluation\.most is 14\.0"),
    ("too many", TRAIN, TRAINED, put("evaluation", episodes=9), r"evaluation\.episodes is 9; .* from 1 to 8"),
    ("too long", TRAIN, TRAINED, put("evaluation", length=201.0), r"evaluation\.length is 201\.0"),
    ("one kl", MEASURE, MEASURED, put("measurement", kl=[0.1]), r"measurement\.kl is \[0\.1\]; .* be 3 finite floats"),
    ("no kl", MEASURE, MEASURED, lambda c: c["measurement"].pop("kl"), r"measurement\.kl is missing"),
    ("more", MEASURE, MEASURED, put("measurement", states=3), r"has \['states'\], which is not part of this message"),
    ("other answer", EVALUATE, MEASURED, put("measurement"), r"\['measurement'\]; they have to be evaluation"),
]


@pytest.mark.parametrize(
    ("instruction", "answer", "change", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_an_impossible_answer_is_refused(instruction: Instruction, answer: Answer, change: Change, reason: str):
    reply = CODEC.write_answer(instruction, answer)
    change(reply)
    with pytest.raises(InvalidMessageError, match=reason) as refused:
        CODEC.read_answer(instruction, reply)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("value", [math.inf, math.nan, 2e38])
def test_huge_shared_blocks_do_not_switch_the_distance_check_off(value: float):
    shared = np.full(SIZE, 1e38, np.float32)
    train = dataclasses.replace(TRAIN, start=dataclasses.replace(START, shared=shared))
    reply = CODEC.write_answer(train, dataclasses.replace(TRAINED, point=np.full(SIZE, value, np.float32)))
    with pytest.raises(InvalidMessageError, match=r"arrays\.point is"):
        CODEC.read_answer(train, reply)


def test_a_fisher_diagonal_that_is_not_needed_is_refused():
    codec = make_codec(mode="off")
    with pytest.raises(InvalidMessageError, match=r"arrays has \['fisher'\]"):
        codec.read_answer(TRAIN, codec.write_answer(TRAIN, TRAINED))


def test_two_policies_or_whole_episodes_allow_more_steps():
    for settings_, most in (
        ("[personal]\nmodel = true\n", 64 + 64),
        ('[objective]\nadvantage = "group"\n[group]\nsize = 2\nby = "task"\n[rollout]\nnum_envs=4\n', 64 + 4 * 500),
    ):
        text = 'name = "w"\nsteps = {steps}\n' + settings_
        rest = '[[clients]]\nname = "cart"\nenv = "grpo_fed/CartPole-v1"\n'
        if "personal" in settings_:
            text = text.format(steps=128) + "[rollout]\nnum_envs = 4\nhorizon = 16\n[objective]\nminibatches = 1\n"
        scenario = Scenario.loads(text.format(steps=64) + rest)
        shared_blocks = resolve_shared_blocks(scenario)
        codec, train = Codec(shared_blocks, scenario), Train(Start("run", 1, shared_blocks.initial.numpy()), 0, 1)
        trained = Trained(shared_blocks.initial.numpy() + 1, most, 0, 0.0, 0.0, {})
        assert codec.read_answer(train, codec.write_answer(train, trained)).steps == most
        more = codec.write_answer(train, dataclasses.replace(trained, steps=most + 1))
        with pytest.raises(InvalidMessageError, match=f"from 0 to {most}"):
            codec.read_answer(train, more)


INSTRUCTIONS: list[tuple[str, Instruction, Change, str]] = [
    ("elsewhere", TRAIN, put("instruction", run="../other"), r"instruction\.run is '\.\./other'; it names a folder"),
    ("hidden", TRAIN, put("instruction", run=".ssh"), r"instruction\.run is '\.ssh'"),
    ("newline", TRAIN, put("instruction", run="run\n"), r"instruction\.run is"),
    ("round 0", TRAIN, put("instruction", round=0), r"instruction\.round is 0; it has to be from 1 to 5"),
    ("round 6", EVALUATE, put("instruction", round=6), r"instruction\.round is 6; it has to be from 0 to 5"),
    ("groups", TRAIN, put("instruction", departed=b""), r"instruction\.departed is b''; it has to be a bit for each"),
    ("backwards", TRAIN, put("instruction", end=0.1), r"instruction\.end is 0\.1; .* from 0\.25 to 1"),
    ("play", TRAIN, lambda c: c["instruction"].pop("deterministic"), r"instruction\.deterministic is missing"),
    ("plays", TRAIN, put("instruction", number=-1), r"instruction\.number is -1"),
    ("unknown", TRAIN, put("instruction", noise=0.1), r"instruction has \['noise'\]"),
    ("nan", TRAIN, put("arrays", shared=with_entry(math.nan)), r"arrays\.shared is nan at entry 0"),
    ("candidate", MEASURE, put("arrays", candidate=with_entry(math.inf)), r"arrays\.candidate is inf at entry 0"),
    ("two arrays", TRAIN, put("arrays", candidate=array_of(SHARED)), r"arrays has \['candidate'\]"),
    ("part of a trial", MEASURE, put("instruction", alphas=[1.0]), r"instruction\.alphas has 1 entries"),
    ("no trial", MEASURE, put("instruction", alphas=[]), r"instruction\.alphas has 0 entries"),
    ("many trials", MEASURE, put("instruction", alphas=[1.0] * 2000), r"instruction\.alphas has 2000 entries"),
    ("too far", MEASURE, put("instruction", alphas=[1.0, 1.5]), r"fractions of a step are floats from 0 to 1"),
    ("no arrays", TRAIN, lambda c: c.pop("arrays"), "the records are "),
]


@pytest.mark.parametrize(
    ("instruction", "change", "reason"), [row[1:] for row in INSTRUCTIONS], ids=[row[0] for row in INSTRUCTIONS]
)
def test_an_invalid_instruction_is_refused(instruction: Instruction, change: Change, reason: str):
    request = recorddict_from_proto(recorddict_to_proto(CODEC.write_instruction(instruction)))
    change(request)
    with pytest.raises(InvalidMessageError, match=reason):
        CODEC.read_instruction(message_type(instruction), request)


def test_an_instruction_of_another_type_is_refused():
    for kind in ("train", "evaluate", "query.hello"):
        with pytest.raises(InvalidMessageError):
            CODEC.read_instruction(kind, CODEC.write_instruction(MEASURE))


# Damaged messages -----------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 64, 10**30, 0.0, -0.5, 1e300, 5e-324, math.nan, math.inf, -math.inf]
LISTS = [[], [1], [0.1], [0.1, 0.2, 0.3], [math.nan] * 3, [-1.0] * 3, [0.0] * 64]
WORDS = ["", "point", "../x", b"", b"\xff", b"\xf0", b"\x40", True, False]
NAMES = [*REPORTED, "point", "fisher", "kl", "steps", "groups", "instruction", "x"]
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
            entry = draw(st.integers(0, (len(data) - 128) // 4 - 1))
            value = draw(st.sampled_from([math.nan, math.inf, 0.0, 1e20, 3e38, 600.0, 0.5]))
            data[128 + 4 * entry : 132 + 4 * entry] = np.float32(value).tobytes()
    return Array(dtype, shape, stype, bytes(data))


@st.composite
def damages(draw: st.DrawFn) -> tuple[Instruction, RecordDict]:
    instruction, answer = draw(st.sampled_from(PAIRS))
    content = recorddict_from_proto(recorddict_to_proto(CODEC.write_answer(instruction, answer)))
    for _ in range(draw(st.integers(1, 2))):
        damage(draw, content)
    return instruction, content


@settings(max_examples=500)
@given(damages())
@example((TRAIN, CODEC.write_answer(TRAIN, TRAINED)))
def test_a_damaged_answer_is_refused_or_still_possible(damaged: tuple[Instruction, RecordDict]):
    instruction, content = damaged
    try:
        answer = CODEC.read_answer(instruction, content)
    except InvalidMessageError:
        return
    assert_possible(instruction, answer)
    again = CODEC.read_answer(instruction, CODEC.write_answer(instruction, answer))
    assert plain(again) == plain(answer)


def assert_possible(instruction: Instruction, answer: Answer) -> None:
    """Check everything that the server relies on, by code of its own."""
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
            assert all(is_reported(name) for name in answer.metrics)
            assert all(math.isfinite(value) for value in answer.metrics.values())
            assert answer.kl is None or (len(answer.kl) == 1 + BLOCKS and all(-1e-6 <= kl < 1e308 for kl in answer.kl))
            assert_possible_summary(answer.evaluation)
        case Measure(), Measured():
            assert len(answer.kl) == len(instruction.fractions)
            assert all(-1e-6 <= kl < math.inf for kl in answer.kl)
        case Evaluate(), Evaluated():
            assert_possible_summary(answer.summary)
        case _:
            raise AssertionError(f"{answer} to {instruction}")


def assert_possible_summary(summary: EvaluationSummary | None) -> None:
    assert summary is not None
    assert summary.least - 1e-3 <= summary.mean <= summary.most + 1e-3 or abs(summary.most) > 100
    *statistics, adapted, cost = dataclasses.astuple(summary)
    assert all(math.isfinite(value) for value in statistics)
    assert (adapted, cost) == ((), None)  # the scenario has neither
    assert 1 <= summary.episodes <= 8
    assert 0 <= summary.length <= 200
    assert summary.std >= 0


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_instruction_is_refused_or_still_possible(data: st.DataObject):
    instruction, _ = data.draw(st.sampled_from(PAIRS))
    content = recorddict_from_proto(recorddict_to_proto(CODEC.write_instruction(instruction)))
    damage(data.draw, content)
    try:
        decoded = CODEC.read_instruction(message_type(instruction), content)
    except InvalidMessageError:
        return
    again = CODEC.read_instruction(message_type(decoded), CODEC.write_instruction(decoded))
    assert plain(again) == plain(decoded)
    assert type(decoded) is type(instruction)
    assert 0 <= decoded.start.round <= 5
    assert "/" not in decoded.start.run
    assert set(decoded.start.departed) <= set(range(GROUPS))
    assert np.isfinite(decoded.start.shared).all()
