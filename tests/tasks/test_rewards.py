"""Rewards: what TRL's trainer makes of the same functions, numbers by hand, and errors that name the place."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.tasks.prompts import open_prompts
from grpo_fed.tasks.rewards import RewardFunction, Rewards, open_rewards
from grpo_fed.tasks.shipped_rewards import SHIPPED_REWARDS, exact, last_number, length, numeric, score_answers
from grpo_fed.tasks.task import MissingPackageError, TaskError

HERE = "tests.tasks.test_rewards"
NAN = math.nan


def letters(completions, **kwargs):
    """Count letters, as a reward that is written for TRL."""
    texts = [part if isinstance(part, str) else part[0]["content"] for part in completions]
    kwargs["log_metric"]("letters", sum(map(len, texts)) / len(texts))
    kwargs["log_extra"]("text", texts)
    return [float(len(text)) for text in texts]


def right_if_known(prompts, completions, answer, **kwargs):
    """Leave out what has no answer."""
    return [
        None if known is None else float(known in str(text)) for text, known in zip(completions, answer, strict=True)
    ]


async def tokens_later(completion_ids, **kwargs):
    await asyncio.sleep(0)
    return [len(tokens) for tokens in completion_ids]


def scaled(completions, factor=1, **kwargs):
    return [factor] * len(completions)


def failing(prompts, **kwargs):
    raise RuntimeError("the judge is away")


def needs_state(completions, trainer_state, **kwargs):
    return [trainer_state.global_step] * len(completions)


def needs_source(completions, source, **kwargs):
    return [1.0] * len(completions)


def without_kwargs(completions):
    return [1.0] * len(completions)


class Judge:
    """Stands for a learned reward model."""

    made = 0

    def __init__(self, bonus):
        type(self).made += 1
        self.bonus = bonus

    def __call__(self, completions, **kwargs):
        return np.arange(len(completions)) + self.bonus


judge = Judge(0.5)
number = 5


def client(*rewards, **keys):
    return ClientSettings(name="up", rewards=list(rewards), **{"prompts": "a.jsonl", **keys})


def only(name, **kwargs):
    return open_rewards("up-0", client({"function": name, "kwargs": kwargs}))


def score(rewards, rows, completions):
    return rewards.score("up-0", rows, completions, [[1] * len(text) for text in completions])


def rewards_of(name, completions, answers=None, **kwargs):
    """Score completions with one reward."""
    rows = [{"prompt": "?", "answer": right} for right in answers or [""] * len(completions)]
    return score(only(name, **kwargs), rows, completions)[:, 0].tolist()


# As TRL calls them ---------------------------------------------------------------------------------------------------


def trl_rewards(functions, rows, completions, completion_ids):
    """Call TRL's own code: the part of its trainer that scores completions, without the trainer."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
    logged = []
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        reward_funcs=functions,
        reward_processing_classes=[None] * len(functions),
        reward_func_names=[f"reward {index}" for index in range(len(functions))],
        state=None,
        environments=None,
        _log_completion_extra=lambda *log: logged.append(log),
        _log_metric=lambda *log: logged.append(log),
        args=SimpleNamespace(report_to=[]),
    )
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(trainer, "gather", lambda rewards: rewards)
        patch.setattr(trainer, "profiling_context", lambda *_: contextlib.nullcontext())
        calculate = trainer.GRPOTrainer._calculate_rewards.__wrapped__
        prompts = [row["prompt"] for row in rows]
        chat = not isinstance(prompts[0], str)
        written = [[{"role": "assistant", "content": text}] for text in completions] if chat else completions
        return calculate(stand_in, rows, prompts, written, completion_ids).numpy()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_rewards_are_those_that_trls_own_code_finds(chat):
    texts = ["1+2=", "1+2=", "4+4=", "say a word"]
    answers = ["3", "3", "8", None]
    rows = [
        {"prompt": [{"role": "user", "content": text}] if chat else text, "answer": answer}
        for text, answer in zip(texts, answers, strict=True)
    ]
    completions, ids = ["3", "it is 3", "#### 9", "word"], [[5], [6, 7, 8], [9, 9], [1]]
    functions = [letters, right_if_known, exact, numeric]
    ours = Rewards(tuple(RewardFunction(function.__name__, function) for function in functions))
    theirs = trl_rewards(functions, rows, completions, ids)
    np.testing.assert_array_equal(ours.score("up-0", rows, completions, ids), theirs)
    assert theirs.tolist()[1][:2] == [7.0, 1.0]
    assert np.isnan(theirs[3]).tolist() == [False, True, True, True]


def test_the_columns_are_passed_as_lists_beside_prompts_and_completions():
    passed = {}

    def spy(**arguments):
        passed.update(arguments)
        return [0.0, 0.0]

    rows = [{"prompt": [{"role": "user", "content": "a"}], "answer": "b", "completion": "c"}] * 2
    Rewards((RewardFunction("spy", spy),)).score("up-0", rows, ["x", "y"], [(1,), (2, 3)])
    assert passed.pop("log_extra")("column", [1, 2]) is None
    assert passed.pop("log_metric")("name", 1.0) is None
    assert passed == {
        "prompts": [rows[0]["prompt"]] * 2,
        "completions": [[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]],
        "completion_ids": [[1], [2, 3]],
        "answer": ["b", "b"],
    }


def test_an_asynchronous_reward_is_waited_for_even_within_an_event_loop():
    async def score_here():
        return score(only(f"{HERE}:tokens_later"), [{"prompt": "a"}] * 2, ["x", "yz"])

    assert asyncio.run(score_here()).tolist() == [[1.0], [2.0]]


def test_keyword_arguments_take_the_place_of_columns():
    rows = [{"prompt": "a", "factor": 9}]
    assert score(only(f"{HERE}:scaled", factor=3), rows, ["x"]).tolist() == [[3.0]]


def test_no_column_takes_the_place_of_a_shipped_rewards_default():
    rows = [{"prompt": "a", "answer": "1", "tolerance": "high"}]
    assert score(only("numeric"), rows, ["1"]).tolist() == [[1.0]]


def test_a_class_is_instantiated_once_with_its_arguments():
    before = Judge.made
    rewards = only(f"{HERE}:Judge", bonus=2.0)
    for _ in range(2):
        assert score(rewards, [{"prompt": "a"}] * 2, ["x", "y"]).tolist() == [[2.0], [3.0]]
    assert Judge.made == before + 1


def test_an_instance_is_called():
    assert score(only(f"{HERE}:judge"), [{"prompt": "a"}], ["x"]).tolist() == [[0.5]]


def test_no_completions_have_no_rewards():
    rewards = only("exact")
    assert score(rewards, [], []).shape == (0, 1)
    assert rewards.total(score(rewards, [], [])).shape == (0,)


# Sums ----------------------------------------------------------------------------------------------------------------


def test_none_leaves_a_completion_out_of_one_reward_and_all_none_out_of_everything():
    rewards = open_rewards(
        "up-0", client({"function": "exact", "weight": 2.0}, {"function": "numeric", "weight": -0.5})
    )
    rows = [{"prompt": "a", "answer": answer} for answer in ("7", "seven", None)]
    scores = score(rewards, rows, ["7", "seven", "7"])
    np.testing.assert_array_equal(scores, [[1, 1], [1, NAN], [NAN, NAN]])
    np.testing.assert_array_equal(rewards.total(scores), [1.5, 2.0, NAN])


@given(
    st.lists(st.lists(st.none() | st.floats(-9, 9), min_size=2, max_size=2), min_size=1, max_size=5),
    st.lists(st.floats(-2, 2), min_size=2, max_size=2),
)
def test_the_total_is_the_weighted_sum_over_what_is_not_none(values, weights):
    rewards = Rewards(tuple(RewardFunction(f"r{weight}", scaled, weight) for weight in weights))
    total = rewards.total(np.array(values, dtype=float))
    for row, found in zip(values, total, strict=True):
        known = [value * weight for value, weight in zip(row, weights, strict=True) if value is not None]
        assert found == pytest.approx(sum(known) if known else NAN, nan_ok=True)


def test_rewards_have_short_names_that_are_all_different():
    rewards = open_rewards(
        "up-0",
        client(
            {"function": "pattern", "kwargs": {"pattern": "a"}},
            {"function": f"{HERE}:letters"},
            {"function": "pattern", "kwargs": {"pattern": "b"}},
        ),
    )
    assert rewards.names == ("pattern-1", "letters", "pattern-2")


# Errors of a call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (5, "returned a int; it must return a list"),
        ("ab", "returned a str; it must return a list"),
        ({0: 1.0, 1: 2.0}, "returned a dict; it must return a list"),
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0, "1"], "returned '1', which is no finite number"),
        ([1.0, [1]], "returned [1], which is no finite number"),
        ([1.0, NAN], "returned nan, which is no finite number; return None to leave a completion out"),
        ([1.0, math.inf], "returned inf, which is no finite number; return None to leave a completion out"),
    ],
)
def test_a_reward_that_returns_something_else_is_named_with_its_prompt(returned, problem):
    rewards = Rewards((RewardFunction("my:judge", lambda **_: returned),))
    rows = [{"prompt": "What is\n  it?"}, {"prompt": [{"role": "user", "content": "long " * 20}]}]
    with pytest.raises(TaskError) as error:
        score(rewards, rows, ["x", "y"])
    second = problem.endswith(("number", "out"))
    prompt = f"prompt 2 of 2: '{('long ' * 12)[:60]}...'" if second else "prompt 1 of 2: 'What is it?'"
    assert str(error.value) == f"client up-0: rewards: my:judge: {problem} ({prompt})"


def test_a_reward_that_raises_is_named_with_its_client_and_prompt():
    with pytest.raises(TaskError) as error:
        score(only(f"{HERE}:failing"), [{"prompt": "a"}], ["x"])
    place = f"client up-0: rewards: {HERE}:failing"
    assert str(error.value) == f"{place}: RuntimeError: the judge is away (prompt 1 of 1: 'a')"


def test_a_reward_that_needs_a_column_that_is_not_there_lists_those_that_are():
    with pytest.raises(TaskError, match="needs the column source, and besides prompt there is answer, topic"):
        score(only(f"{HERE}:needs_source"), [{"prompt": "a", "answer": "b", "topic": "c"}], ["x"])
    with pytest.raises(TaskError, match="rewards: exact: needs the column answer, and besides prompt there is none"):
        score(only("exact"), [{"prompt": "a"}], ["x"])


def test_rows_completions_and_tokens_are_equally_many():
    with pytest.raises(ValueError, match=r"^1 rows, 2 completions, 2 of tokens$"):
        score(only("exact"), [{"prompt": "a"}], ["x", "y"])


# Opening -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("exact", {"case": False}, "kwargs.case: there is no such argument; it has none"),
        (
            "numeric",
            {"tolerance": -1.0},
            "kwargs = {'tolerance': -1.0}: ValueError: tolerance = -1.0 must be 0 or more",
        ),
        ("pattern", {}, "kwargs.pattern: missing; it has pattern, full"),
        (
            "pattern",
            {"pattern": "("},
            "kwargs = {'pattern': '('}: error: missing ), unterminated subpattern at position 0",
        ),
        (
            "format",
            {"tags": "think"},
            """kwargs = {'tags': 'think'}: ValueError: tags = 'think' must be a list such as ["think", "answer"]""",
        ),
        ("length", {"target": 5}, "kwargs.most: missing; it has target, most"),
        (
            "length",
            {"target": 5, "most": 5},
            (
                "kwargs = {'target': 5, 'most': 5}: ValueError: target = 5, most = 5: target must be 0 or more,"
                " and most above it"
            ),
        ),
        (f"{HERE}:nothing", {}, f"cannot be imported: AttributeError: module '{HERE}' has no attribute 'nothing'"),
        (f"{HERE}:number", {}, "is a int, which cannot be called"),
        (
            f"{HERE}:Judge",
            {},
            (
                "cannot be made with kwargs = {}: TypeError: Judge.__init__() missing 1 required positional argument:"
                " 'bonus'"
            ),
        ),
        (f"{HERE}:needs_state", {}, "needs trainer_state, which only TRL's trainer has; give it a default"),
        (
            f"{HERE}:without_kwargs",
            {},
            (
                "must take **kwargs: it is called with prompts, completions, completion_ids, log_extra, log_metric and"
                " all columns"
            ),
        ),
    ],
)
def test_a_reward_that_cannot_be_opened_is_named_with_a_cure(name, kwargs, problem):
    with pytest.raises(ValueError, match=name) as error:
        only(name, **kwargs)
    assert str(error.value) == f"client up-0: rewards: {name}: {problem}"


def test_a_reward_of_a_package_that_is_missing_here_may_be_on_the_clients_machine():
    with pytest.raises(MissingPackageError, match=r"^client up-0: rewards: no_such_module:f: cannot be imported: "):
        only("no_such_module:f")


@pytest.mark.parametrize("keys", [{}, {"prompts": "reasoning_gym:chain_sum", "eval_prompts": "a.jsonl"}])
def test_prompts_that_have_no_reward_of_their_own_need_one(keys):
    with pytest.raises(ValueError, match="rewards: none") as error:
        open_rewards("up-0", client(**keys))
    assert str(error.value) == (
        "client up-0: rewards: none, and a.jsonl has none of its own, as only reasoning-gym has; give some, such as"
        ' [{ function = "exact" }]'
    )


def test_reasoning_gym_has_its_own_reward_unless_others_are_given():
    task = "reasoning_gym:chain_sum"
    assert open_rewards("up-0", client(prompts=task)).names == ("reasoning_gym",)
    assert open_rewards("up-0", client({"function": "exact"}, prompts=task)).names == ("exact",)


# Those that ship -----------------------------------------------------------------------------------------------------


def test_exact_compares_without_the_spaces_around():
    assert rewards_of("exact", [" cba\n", "cb a", "", "12"], ["cba", "cba", "x", 12]) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so it is 12.", 12),
        ("first 3, then 4", 4),
        ("5,6,7", 7),
        ("about 1,234,567.5 in all", 1234567.5),
        ("12,345, roughly", 12345),
        ("x = -4", -4),
        ("\N{MINUS SIGN}7", -7),
        ("12-5", 5),
        ("3/4", 0.75),
        ("-1 / 2", -0.5),
        ("1.5e3", 1500),
        (".5", 0.5),
        ("$5 or 12%", 12),
        ("10km", 10),
        ("3 + 15 = 18\n#### 1,018 dollars", 1018),
        (r"\boxed{7}, not 8", 7),
        (r"\boxed{\frac{3}{4}} of 100", 0.75),
        (r"\boxed{1} and then \boxed{{2}} 3", 2),
        (r"\boxed{5", 5),
        ("H2O", None),
        ("3/0", None),
        ("1e999", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, found):
    assert last_number(text) == found


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "= {}.", r"\boxed{{{}}} 3", "9\n#### {:,}"]))
def test_a_number_is_read_back_however_it_is_written(value, form):
    assert last_number(form.format(value)) == value


@given(st.text(max_size=40), st.text(alphabet="0123456789.,-+/eE{}\\boxedfrac# ", max_size=40))
def test_reading_a_number_never_fails(text, digits):
    for part in (text, digits):
        found = last_number(part)
        assert found is None or math.isfinite(found)


def test_numeric_takes_numbers_within_the_tolerance_and_leaves_out_answers_without_one():
    completions = ["it is 0.75", "3/4", "0.76", "none", "5", "100001"]
    answers = ["#### 3/4", 0.75, "0.75", "1", "five", "100000"]
    assert rewards_of("numeric", completions, answers)[:4] == [1.0, 1.0, 0.0, 0.0]
    assert np.isnan(rewards_of("numeric", completions, answers)[4])
    assert rewards_of("numeric", completions, answers, tolerance=1e-5)[5] == 1.0
    assert rewards_of("numeric", completions, answers, tolerance=0.9e-5)[5] == 0.0


def test_pattern_matches_all_of_a_completion_or_a_part():
    completions = ["The 12.", "12", "twelve"]
    assert rewards_of("pattern", completions, pattern=r"\d+") == [0.0, 1.0, 0.0]
    assert rewards_of("pattern", completions, pattern=r"\d+", full=False) == [1.0, 1.0, 0.0]


def test_format_wants_each_part_once_and_in_order():
    completions = [
        "<think>a\nb</think>\n<answer>c</answer>\n",
        "<think>a</think> so <answer>c</answer>",
        "<answer>c</answer><think>a</think>",
        "<think>a</think><think>b</think><answer>c</answer>",
        "<think>a<answer>c</answer></think>",
        "<think>a</think><answer>c",
    ]
    assert rewards_of("format", completions) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert rewards_of("format", ["<a.>x</a.>", "<ab>x</ab>"], tags=["a."]) == [1.0, 0.0]


def test_length_falls_linearly_from_the_target_on():
    texts = ["a" * tokens for tokens in (0, 4, 6, 8, 9)]
    assert rewards_of("length", texts, target=4, most=8) == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_every_shipped_reward_takes_messages_and_any_column():
    message = [[{"role": "assistant", "content": "12"}]]
    kwargs = {"pattern": {"pattern": "12"}, "length": {"target": 4, "most": 8}, "format": {"tags": ["b"]}}
    expected = {"exact": 1.0, "numeric": 1.0, "pattern": 1.0, "format": 0.0, "length": 1.0}
    for name, function in SHIPPED_REWARDS.items():
        columns = {"prompts": message, "completions": message, "completion_ids": [[5]], "answer": ["12"], "topic": [1]}
        assert function(**columns, trainer_state=None, **kwargs.get(name, {})) == [expected[name]]


def test_length_counts_tokens_not_letters():
    assert length(completions=["abcdefgh"], completion_ids=[[1, 2]], target=2, most=4) == [1.0]


# reasoning-gym -------------------------------------------------------------------------------------------------------


def test_the_tagged_answer_is_scored_or_all_of_a_completion_without_tags():
    scored = []

    def score_answer(answer, entry):
        scored.append((answer, entry))
        return 0.5

    texts = [" 12 ", "<answer>1</answer> no, <answer>\n2</answer>", [{"role": "assistant", "content": "c"}]]
    assert score_answers(texts, entry=[1, 2, 3], score_answer=[score_answer] * 3) == [0.5] * 3
    assert scored == [("12", 1), ("2", 2), ("c", 3)]


def test_an_answer_that_the_task_fails_on_is_worth_nothing_but_a_task_that_always_fails_is_an_error():
    def strict(answer, entry):
        return float(int(answer) == 3)

    entries = [{"answer": "3"}, {"answer": "3"}]
    assert score_answers(["three", "3"], entry=entries, score_answer=[strict] * 2) == [0.0, 1.0]
    with pytest.raises(ValueError, match="invalid literal"):
        score_answers(["three"], entry=[{"answer": "drei"}], score_answer=[strict])


def test_reasoning_gym_scores_its_own_answers():
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    settings = client(prompts="reasoning_gym:prime_factorization")
    rows = open_prompts("up-0", settings).train.rows(np.random.default_rng, 3, 3)
    completions = [rows[0]["answer"], f"<think>?</think><answer>{rows[1]['answer']}</answer>", "x"]
    assert score(open_rewards("up-0", settings), rows, completions).tolist() == [[1.0], [1.0], [0.0]]
