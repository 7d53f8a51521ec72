"""Prompts: exact by number, gone through without repetition, apart for evaluation, and errors that name the place."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from grpo_fed.scenario.settings import ClientSettings
from grpo_fed.tasks.prompts import FilePrompts, FunctionPrompts, ReasoningPrompts, open_prompts
from grpo_fed.tasks.task import MissingPackageError, TaskError

HERE = "tests.tasks.test_prompts"


def stream(number):
    """Stand for a client's stream, as the caller passes it."""
    return np.random.default_rng([7, number])


def sums(generator, count, most=9):
    """Make additions, as a user's function does."""
    pairs = generator.integers(0, most + 1, (count, 2)).tolist()
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


class Bad:
    """Functions that return something else than rows."""

    text = "no function"

    @staticmethod
    def no_list(generator, count):
        return {"prompt": "a"}

    @staticmethod
    def too_few(generator, count):
        return [{"prompt": "a"}] * (count - 1)

    @staticmethod
    def no_mapping(generator, count):
        return ["a"] * count

    @staticmethod
    def no_prompt(generator, count):
        return [{"question": "a", "answer": "b"}] * count

    @staticmethod
    def no_text(generator, count):
        return [{"prompt": 5}] * count

    @staticmethod
    def uneven(generator, count):
        return [{"prompt": "a", "answer": "b"}, {"prompt": "a"}][:count]

    @staticmethod
    def fails(generator, count):
        raise KeyError("x")


def client(**keys):
    return ClientSettings(name="up", **keys)


def file_of(count):
    return FilePrompts("up-0", "prompts: a.jsonl", [{"prompt": str(index)} for index in range(count)])


def prompts_of(rows):
    return [row["prompt"] for row in rows]


@pytest.fixture
def questions(tmp_path):
    """Write a file of ten questions, 0 to 9."""
    lines = [json.dumps({"prompt": str(index), "answer": index}) for index in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


# Functions -----------------------------------------------------------------------------------------------------------


def test_a_function_is_called_with_the_numbered_generator_the_count_and_kwargs():
    source = open_prompts("up-0", client(prompts=f"{HERE}:sums", kwargs={"most": 3})).train
    assert source.rows(stream, 4, 6) == sums(np.random.default_rng([7, 4]), 6, most=3)


def test_evaluation_with_a_function_is_the_same_function():
    pair = open_prompts("up-0", client(prompts=f"{HERE}:sums"))
    assert isinstance(pair.train, FunctionPrompts)
    assert pair.evaluate is pair.train


def test_eval_prompts_are_a_source_of_their_own(questions):
    pair = open_prompts("up-0", client(prompts="a.jsonl", eval_prompts=f"{HERE}:sums"), questions)
    assert len(pair.train.contents) == 10
    assert pair.evaluate.name == f"eval_prompts: {HERE}:sums"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_list", "returned dict; it must return a list of 2 rows"),
        ("too_few", "returned 1 rows; it must return a list of 2 rows"),
        ("no_mapping", "row 0 is a str; it must be a mapping with a key prompt"),
        ("no_prompt", "row 0 has no key prompt, only question, answer"),
        (
            "no_text",
            "row 0 has the prompt 5; it must be text, or a list of messages with a role and a content, both text",
        ),
        ("uneven", "row 1 has the keys prompt, and row 0 has prompt, answer; give all rows the same"),
        ("fails", "KeyError: 'x'"),
    ],
)
def test_a_function_that_returns_no_rows_is_named_with_its_client_and_problem(name, problem):
    source = open_prompts("up-0", client(prompts=f"{HERE}:Bad.{name}")).train
    with pytest.raises(TaskError) as error:
        source.rows(stream, 0, 2)
    assert str(error.value) == f"client up-0: prompts: {HERE}:Bad.{name}: {problem}"


@pytest.mark.parametrize(
    "prompt",
    [[], ["a"], [{"role": "user"}], [{"role": "user", "content": [{"type": "text"}]}], None, ({"role": "u"},)],
)
def test_a_prompt_is_text_or_messages_of_text(prompt):
    source = FunctionPrompts("up-0", "prompts: f", lambda generator, count: [{"prompt": prompt}], {})
    with pytest.raises(TaskError, match="it must be text, or a list of messages"):
        source.rows(stream, 0, 1)


def test_chat_messages_are_prompts():
    rows = [{"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]}]
    assert FunctionPrompts("up-0", "prompts: f", lambda generator, count: rows, {}).rows(stream, 0, 1) == rows


# Files ---------------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 12), count=st.integers(1, 30), draws=st.integers(1, 6))
def test_a_file_is_gone_through_without_repetition_within_a_pass(size, count, draws):
    source = file_of(size)
    drawn = [prompt for number in range(draws) for prompt in prompts_of(source.rows(stream, number, count))]
    for begin in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[begin : begin + size], key=int) == prompts_of(source.contents)
    assert max(Counter(drawn[len(drawn) // size * size :]).values(), default=0) <= 1


@given(size=st.integers(1, 12), count=st.integers(1, 9), numbers=st.permutations(range(5)))
def test_draws_are_exact_by_number_whatever_was_drawn_before(size, count, numbers):
    drawn = {number: file_of(size).rows(stream, number, count) for number in range(5)}
    source = file_of(size)
    assert {number: source.rows(stream, number, count) for number in numbers} == drawn


def test_each_pass_has_an_order_of_its_own_from_the_stream_of_its_number():
    orders = [prompts_of(file_of(8).rows(stream, number, 8)) for number in range(2)]
    by_hand = [[str(index) for index in np.random.default_rng([7, number]).permutation(8)] for number in range(2)]
    assert orders == by_hand
    assert orders[0] != orders[1]


def test_the_last_rows_of_a_file_are_held_out_for_evaluation(questions):
    pair = open_prompts("up-0", client(prompts="a.jsonl", held_out=0.3), questions)
    assert prompts_of(pair.train.contents) == list("0123456")
    assert prompts_of(pair.evaluate.contents) == list("789")


def test_at_least_one_row_is_held_out(questions):
    pair = open_prompts("up-0", client(prompts="a.jsonl", held_out=0.001), questions)
    assert prompts_of(pair.evaluate.contents) == ["9"]


def test_changing_a_drawn_row_does_not_change_the_file():
    messages = [{"role": "user", "content": "a"}]
    source = FilePrompts("up-0", "prompts: a.jsonl", [{"prompt": messages}])
    source.rows(stream, 0, 1)[0]["prompt"].append({"role": "assistant", "content": "b"})
    assert source.rows(stream, 0, 1) == [{"prompt": [{"role": "user", "content": "a"}]}]


def test_a_column_that_a_row_lacks_is_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "answer": 1}\n')
    pair = open_prompts("up-0", client(prompts="a.jsonl", held_out=0.5), tmp_path)
    assert pair.train.contents == [{"prompt": "a", "answer": None}]
    assert pair.evaluate.contents == [{"prompt": "b", "answer": 1}]


def test_a_line_ends_at_its_line_feed_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}'.encode())
    pair = open_prompts("up-0", client(prompts="a.jsonl"), tmp_path)
    assert prompts_of([*pair.train.contents, *pair.evaluate.contents]) == ["a\u2028b", "c"]


def test_a_parquet_file_is_read_with_its_messages(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    rows = [{"prompt": [{"role": "user", "content": str(index)}], "answer": index} for index in range(3)]
    parquet.write_table(table.from_pylist(rows), tmp_path / "a.parquet")
    pair = open_prompts("up-0", client(prompts="a.parquet"), tmp_path)
    assert [*pair.train.contents, *pair.evaluate.contents] == rows


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": "a"}\n\n{"prompt": ', "line 3 is no JSON: Expecting value: line 1 column 12 (char 11)"),
        ('{"prompt": "a"}\n[1]', "line 2 is a list; it must be a mapping with a key prompt"),
        ("{}", "line 1 has no key prompt, only none at all"),
        ('{"question": "a"}', "line 1 has no key prompt, only question"),
        (
            '{"prompt": 5}',
            "line 1 has the prompt 5; it must be text, or a list of messages with a role and a content, both text",
        ),
        ("\n", "the file has no rows"),
        (
            '{"prompt": "a"}',
            "has 1 rows, and held_out = 0.1 leaves none to train on; lower held_out, or give eval_prompts",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, problem):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"^client up-0: prompts: ") as error:
        open_prompts("up-0", client(prompts="a.jsonl"), tmp_path)
    assert str(error.value) == f"client up-0: prompts: a.jsonl: {problem}"


def test_a_file_that_is_no_text_or_no_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    for name, text in (("a.jsonl", "is not UTF-8: "), ("a.parquet", "cannot be read: ArrowInvalid: ")):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=f"^client up-0: prompts: {name}: {text}"):
            open_prompts("up-0", client(prompts=name), tmp_path)


def test_a_file_that_is_missing_here_may_be_on_the_clients_machine(tmp_path):
    with pytest.raises(MissingPackageError) as error:
        open_prompts("up-0", client(prompts="b.parquet"), tmp_path)
    assert str(error.value) == f"client up-0: prompts: b.parquet: there is no file {tmp_path / 'b.parquet'}"


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingPackageError, match=r"^client up-0: prompts: a.parquet: needs pyarrow: pip install pyar"):
        open_prompts("up-0", client(prompts="a.parquet"), tmp_path)


def test_nothing_held_out_needs_eval_prompts(questions):
    settings = client(prompts="a.jsonl", held_out=0.0)
    cure = "held_out = 0 leaves no prompts for evaluation; give eval_prompts, or a held_out above 0"
    with pytest.raises(ValueError, match=f"^client up-0: prompts: a.jsonl: {re.escape(cure)}$"):
        open_prompts("up-0", settings, questions)
    pair = open_prompts("up-0", settings.model_copy(update={"eval_prompts": "a.jsonl"}), questions)
    assert pair.evaluate.contents == pair.train.contents


def test_a_file_takes_no_arguments(questions):
    with pytest.raises(ValueError, match=r"^client up-0: kwargs = \{'most': 3\}: a file of prompts takes none"):
        open_prompts("up-0", client(prompts="a.jsonl", kwargs={"most": 3}), questions)


# Sources that cannot be opened ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["questions.csv", "questions", "my module:f", "f:"])
def test_a_source_of_no_known_kind_is_refused_with_those_that_there_are(source):
    with pytest.raises(ValueError, match="must be") as error:
        open_prompts("up-0", client(prompts=f"{HERE}:sums", eval_prompts=source))
    assert str(error.value) == (
        f'client up-0: eval_prompts: {source}: must be "module:function", the path of a .jsonl or .parquet file, or'
        ' "reasoning_gym:NAME", such as reasoning_gym:chain_sum'
    )


def test_a_client_without_prompts_is_refused():
    with pytest.raises(ValueError, match=r'^client up-0: prompts: missing; it must be "module:function", the path'):
        open_prompts("up-0", client(env="CartPole-v1"))


@pytest.mark.parametrize(
    ("source", "error_type", "problem"),
    [
        (
            "no_such_module:f",
            MissingPackageError,
            (
                "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'; is it installed, or on"
                " PYTHONPATH?"
            ),
        ),
        ("json:nothing", ValueError, "cannot be imported: AttributeError: module 'json' has no attribute 'nothing'"),
        (f"{HERE}:Bad.text", ValueError, "is a str, not a function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(source, error_type, problem):
    with pytest.raises(error_type) as error:
        open_prompts("up-0", client(prompts=source))
    assert type(error.value) is error_type
    assert str(error.value) == f"client up-0: prompts: {source}: {problem}"


# reasoning-gym -------------------------------------------------------------------------------------------------------


def test_reasoning_gym_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    cure = re.escape("needs a package that is not installed: pip install 'reasoning-gym<0.2,>=0.1.25' (")
    with pytest.raises(MissingPackageError, match=f"^client up-0: prompts: reasoning_gym:chain_sum: {cure}"):
        open_prompts("up-0", client(prompts="reasoning_gym:chain_sum"))


@pytest.fixture
def reasoning_gym():
    """Skip where the package is not installed; our own code imports it, and must raise none of its warnings."""
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    open_prompts("up-0", client(prompts="reasoning_gym:chain_sum"))
    return sys.modules["reasoning_gym"]


def test_reasoning_gym_makes_questions_by_number(reasoning_gym):
    pair = open_prompts("up-0", client(prompts="reasoning_gym:chain_sum", kwargs={"max_terms": 3}))
    assert isinstance(pair.train, ReasoningPrompts)
    rows = [pair.train.rows(stream, number, 4) for number in range(2)]
    seed = int(np.random.default_rng([7, 1]).integers(2**31))
    by_hand = reasoning_gym.create_dataset("chain_sum", seed=seed, size=4, max_terms=3)
    assert [row["entry"] for row in rows[1]] == list(by_hand)
    assert prompts_of(rows[1]) == [entry["question"] for entry in by_hand]
    assert prompts_of(pair.train.rows(stream, 0, 4)) == prompts_of(rows[0])
    assert prompts_of(rows[0]) != prompts_of(rows[1])
    assert [row["score_answer"](row["answer"], row["entry"]) for row in rows[0]] == [1.0] * 4


@pytest.mark.parametrize(
    ("source", "kwargs", "problem"),
    [
        ("chain_som", {}, r"reasoning-gym has no task 'chain_som'; did you mean chain_sum"),
        ("qqqqqqqq", {}, r"reasoning-gym has no task 'qqqqqqqq'; its GALLERY.md lists all$"),
        ("chain_sum", {"terms": 3}, r"cannot be made with kwargs = \{'terms': 3\}: TypeError: .*'terms'"),
        ("chain_sum", {"min_terms": 0}, r"cannot be made with kwargs = \{'min_terms': 0\}: AssertionError: "),
        ("chain_sum", {"seed": 1}, r"kwargs.seed = 1: it is drawn for each batch; remove it$"),
    ],
)
def test_a_reasoning_task_that_cannot_be_made_is_named(reasoning_gym, source, kwargs, problem):
    with pytest.raises(ValueError, match=f"^client up-0: prompts: reasoning_gym:{source}: {problem}"):
        open_prompts("up-0", client(prompts=f"reasoning_gym:{source}", kwargs=kwargs))


def test_a_reasoning_task_that_fails_later_is_named(reasoning_gym):
    source = ReasoningPrompts("up-0", "prompts: reasoning_gym:chain_sum", "chain_sum", {"min_terms": 0})
    with pytest.raises(TaskError, match=r"^client up-0: prompts: reasoning_gym:chain_sum: AssertionError: "):
        source.rows(stream, 0, 1)
