"""The line of every key in a TOML text."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from grpo_fed.scenario.toml.lines import KeyPath, line_numbers, split_key

TRICKY = '''\
# a comment with [brackets] and key = 1
name = "a # in \\" quotes" # and one after
a.b . "c d" = 1

[one]  # a table
  x = """
y = 1
[not a table]
\\""" still inside"""
z = \'\'\'
z = 2\'\'\'
list = [
  1, # one
  [2, 3], { p = "]", q.r = [4,
  5] },
]
when = 1979-05-27 07:32:00 # a space in a value
w = {}
[ two . three ]
x = ""
empty = []
[[four]]
x = 1
[[four]]
x = 2
[four.five]
x = 3
[[four.six]]
x = 4
[[four.six]]
[four.six.seven]
'x.y' = 5
'''

LINES = {
    ("name",): 2,
    ("a",): 3,
    ("a", "b"): 3,
    ("a", "b", "c d"): 3,
    ("one",): 5,
    ("one", "x"): 6,
    ("one", "z"): 10,
    ("one", "list"): 12,
    ("one", "list", 0): 13,
    ("one", "list", 1): 14,
    ("one", "list", 1, 0): 14,
    ("one", "list", 1, 1): 14,
    ("one", "list", 2): 14,
    ("one", "list", 2, "p"): 14,
    ("one", "list", 2, "q"): 14,
    ("one", "list", 2, "q", "r"): 14,
    ("one", "list", 2, "q", "r", 0): 14,
    ("one", "list", 2, "q", "r", 1): 15,
    ("one", "when"): 17,
    ("one", "w"): 18,
    ("two",): 19,
    ("two", "three"): 19,
    ("two", "three", "x"): 20,
    ("two", "three", "empty"): 21,
    ("four",): 22,
    ("four", 0): 22,
    ("four", 0, "x"): 23,
    ("four", 1): 24,
    ("four", 1, "x"): 25,
    ("four", 1, "five"): 26,
    ("four", 1, "five", "x"): 27,
    ("four", 1, "six"): 28,
    ("four", 1, "six", 0): 28,
    ("four", 1, "six", 0, "x"): 29,
    ("four", 1, "six", 1): 30,
    ("four", 1, "six", 1, "seven"): 31,
    ("four", 1, "six", 1, "seven", "x.y"): 32,
}


def paths(data: Any, above: KeyPath = ()) -> Iterator[KeyPath]:
    """List every key and item of parsed TOML."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from paths(value, (*above, key))


def test_every_kind_of_key_is_found_on_its_line():
    assert line_numbers(TRICKY) == LINES


def test_the_expected_lines_cover_every_key_that_tomllib_reads():
    assert set(paths(tomllib.loads(TRICKY))) == set(LINES)


def test_windows_line_ends_count_once():
    assert line_numbers(TRICKY.replace("\n", "\r\n")) == LINES


@pytest.mark.parametrize(
    "quotes", ['x = """a""""', 'x = """a"""""', "x = '''a'''''", 'x = """"a"""', 'x = """"""', "x = ''"]
)
def test_a_string_ends_where_tomllib_ends_it(quotes: str):
    text = f"{quotes}\ny = 1"
    assert set(tomllib.loads(text)) == {"x", "y"}
    assert line_numbers(text) == {("x",): 1, ("y",): 2}


KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5) | st.sampled_from(["a", "b", "a.b", "", '"'])
SCALARS = st.integers(-9, 9) | st.booleans() | st.floats(allow_nan=False) | st.dates() | st.datetimes()
SCALARS |= st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ['"', "'''", '"""', "[", "#\n"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=12
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_every_key_that_tomllib_reads_is_on_its_line(data: dict[str, Any], multiline: bool):
    text = tomli_w.dumps(data, multiline_strings=multiline)
    read = tomllib.loads(text)
    lines = line_numbers(text)
    assert set(paths(read)) == set(lines)
    rows = text.split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str):
            assert path[-1] in rows[line - 1] or tomli_w.dumps({path[-1]: 1}).split(" =")[0] in rows[line - 1]


def test_a_dotted_key_is_split_as_in_toml():
    assert split_key('trust . blocks."torso.*"') == ("trust", "blocks", "torso.*")
    assert split_key("clients.0.env") == ("clients", "0", "env")


@pytest.mark.parametrize("text", ["", "a.", ".a", "a b", '"a', "a]", "a..b"])
def test_an_invalid_key_is_refused(text: str):
    with pytest.raises(ValueError, match="is not a key"):
        split_key(text)
