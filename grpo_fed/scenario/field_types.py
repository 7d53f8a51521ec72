"""Kinds of values that a knob can have, beyond what Python has names for."""

from __future__ import annotations

import math
import re
from datetime import date, time
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import AfterValidator, BeforeValidator, Discriminator, PlainSerializer, Tag, WithJsonSchema

_PATH = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"


def _name(text: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise ValueError("must be letters, digits and _ . - only, a letter or digit first: it names files")
    return text


def _pattern(text: str) -> str:
    if not text or re.search(r"\s", text):
        raise ValueError('must be a pattern such as "torso.*"')
    return text


def _import_path(text: str) -> str:
    if not re.fullmatch(_PATH, text):
        raise ValueError('must be "package.module:Name"')
    return text


def _named_or_own(value: Any) -> str:
    return "own" if isinstance(value, str) and ":" in value else "named"


def _environment(text: str) -> str:
    if not re.fullmatch(r"([\w.]+:)?([\w:-]+/)?[\w:.-]+", text):
        raise ValueError('must be a gymnasium id, such as "CartPole-v1", or "module:EnvId"')
    return text


def _device(text: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise ValueError('must be "auto", "cpu", "cuda" or "cuda:0" with a number')
    return text


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Only what TOML can hold, since every scenario is saved as TOML; tuples become lists."""
    return {key: _plain(value, key) for key, value in given.items()}


def _plain(value: Any, place: str) -> Any:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}.{number}") for number, item in enumerate(value)]
    if isinstance(value, float) and not math.isnan(value):
        return float(value)  # numpy's float64 is one
    if not isinstance(value, str | int | date | time):
        raise ValueError(f"{place} must be text, a number, true or false, a list or a table")
    return value


def _index_set(key: str) -> str:
    if not re.fullmatch(r"[^\s:]+:(rows|columns|entries)", key):
        raise ValueError('must be "PARAMETER:rows", "PARAMETER:columns" or "PARAMETER:entries"')
    return key


def _group_kind(value: Any) -> str | None:
    return "kind" if isinstance(value, str) else "sets" if isinstance(value, dict) else None


Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Gt(0)]
Size = Annotated[int, Gt(0), Le(65_536)]
BoundedCount = Annotated[int, Gt(0), Le(1_000_000)]
"""Of what memory is made for at once: a figure too many in it is a mistake, and would fill the machine before anybody
could say so."""
_READ = BeforeValidator(lambda value: None if value == math.inf else value)
_WRITTEN = PlainSerializer(lambda value: math.inf if value is None else value, return_type=float)
Limit = Annotated[Positive | None, _READ, _WRITTEN]
"""None is no limit, `inf` in TOML."""
LimitOrZero = Annotated[NotNegative | None, _READ, _WRITTEN]
"""A limit that may be 0."""
Name = Annotated[str, MaxLen(64), AfterValidator(_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
ImportPath = Annotated[
    str, AfterValidator(_import_path), WithJsonSchema({"type": "string", "pattern": r"^[\w.]+:[\w.]+$"})
]
OwnPath = Annotated[ImportPath, Tag("own")]
Named = Tag("named")
NAMED_OR_OWN = Discriminator(_named_or_own)
"""For a choice of names, `Annotated[Literal[...], Named]`, or an import path to something of the user's, `Own`."""
Environment = Annotated[str, AfterValidator(_environment)]
Device = Annotated[str, AfterValidator(_device)]
Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]
Indices = Annotated[list[Annotated[int, Ge(0)]], MinLen(1)]
GroupRule = Annotated[
    Annotated[Literal["block", "tensor", "row", "column"], Tag("kind")]
    | Annotated[dict[str, dict[Annotated[str, AfterValidator(_index_set)], Indices]], Tag("sets")],
    Discriminator(
        _group_kind,
        custom_error_type="group_rule",
        custom_error_message='must be one of "block" "tensor" "row" "column", or a table of index sets',
    ),
]
