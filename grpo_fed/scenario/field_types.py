"""Types of values that settings take, with their limits and checks, beyond the types of Python."""

from __future__ import annotations

import math
import re
from datetime import date, time
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, PlainSerializer, Tag, WithJsonSchema

IMPORT_PATH = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"
"""Regular expression of an import path, `package.module:Name`."""


def _name(text: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        raise ValueError("must be letters, digits and _ . - only, a letter or digit first: it names files")
    return text


def _pattern(text: str) -> str:
    if not text or re.search(r"\s", text):
        raise ValueError('must be a pattern such as "torso.*"')
    return text


def _import_path(text: str) -> str:
    if not re.fullmatch(IMPORT_PATH, text):
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


def _arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Accept only values that TOML can represent, since every scenario is saved as TOML; tuples become lists."""
    return {key: _toml_value(value, key) for key, value in arguments.items()}


def _toml_value(value: Any, key: str) -> Any:
    """Check a value of any depth; `key` names it in errors."""
    if isinstance(value, dict) and all(isinstance(part, str) for part in value):
        return {part: _toml_value(item, f"{key}.{part}") for part, item in value.items()}
    if isinstance(value, list | tuple):
        return [_toml_value(item, f"{key}.{index}") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isnan(value):
        return float(value)  # also turns numpy's float64 into a plain float
    if not isinstance(value, str | int | date | time):
        raise ValueError(f"{key} must be text, a number, true or false, a list or a table")
    return value


def _callback(table: dict[str, Any]) -> dict[str, Any]:
    """Check a table that names a callback."""
    if unknown := [key for key in table if key not in ("path", "kwargs")]:
        raise ValueError(f"has {unknown[0]}: unknown key; known here: path kwargs")
    if not isinstance(table.get("path"), str):
        raise ValueError('must have a path: { path = "package.module:Name" }')
    kwargs = table.get("kwargs", {})
    if not isinstance(kwargs, dict):
        raise ValueError("must have a table of kwargs: { patience = 5 }")
    return {"path": _import_path(table["path"]), "kwargs": _arguments(kwargs)}


def _callback_kind(value: Any) -> str | None:
    return "path" if isinstance(value, str) else "table" if isinstance(value, dict) else None


def _index_set(key: str) -> str:
    if not re.fullmatch(r"[^\s:]+:(rows|columns|entries)", key):
        raise ValueError('must be "PARAMETER:rows", "PARAMETER:columns" or "PARAMETER:entries"')
    return key


def _wrapper_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "path"
    return "table" if isinstance(value, dict | BaseModel) else None


def _group_kind(value: Any) -> str | None:
    return "kind" if isinstance(value, str) else "sets" if isinstance(value, dict) else None


Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Gt(0)]
Size = Annotated[int, Gt(0), Le(65_536)]
BoundedCount = Annotated[int, Gt(0), Le(1_000_000)]
"""A count for which memory is allocated at once. A larger one is a typing error that would fill the memory before it is
noticed."""
_INF_TO_NONE = BeforeValidator(lambda value: None if value == math.inf else value)
_NONE_TO_INF = PlainSerializer(lambda value: math.inf if value is None else value, return_type=float)
Limit = Annotated[Positive | None, _INF_TO_NONE, _NONE_TO_INF]
"""A limit above 0; None means no limit and is `inf` in TOML."""
LimitOrZero = Annotated[NotNegative | None, _INF_TO_NONE, _NONE_TO_INF]
"""A limit that may also be 0."""
Name = Annotated[str, MaxLen(64), AfterValidator(_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
ImportPath = Annotated[
    str, AfterValidator(_import_path), WithJsonSchema({"type": "string", "pattern": r"^[\w.]+:[\w.]+$"})
]
OwnPath = Annotated[ImportPath, Tag("own")]
Named = Tag("named")
PATH_OR_TABLE = Discriminator(
    _wrapper_form,
    custom_error_type="wrapper",
    custom_error_message='must be "module:Wrapper", or a table { path = "module:Wrapper", kwargs = {} }',
)
"""Chooses between an import path, `Annotated[ImportPath, Tag("path")]`, and a table with it and arguments."""
NAMED_OR_OWN = Discriminator(_named_or_own)
"""Chooses between a name, `Annotated[Literal[...], Named]`, and the import path of an object of the user, `OwnPath`."""
FilePath = Annotated[str, MinLen(1)]
"""The path of a file or a folder; a relative one is below the folder in which a command is called."""
Environment = Annotated[str, AfterValidator(_environment)]
Device = Annotated[str, AfterValidator(_device)]
Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]
CallbackEntry = Annotated[
    Annotated[ImportPath, Tag("path")] | Annotated[dict[str, Any], AfterValidator(_callback), Tag("table")],
    Discriminator(
        _callback_kind,
        custom_error_type="callback",
        custom_error_message='must be "package.module:Name", or a table of path and kwargs',
    ),
]
"""The import path of a callback's class, alone or with the arguments that it is made with."""
Indices = Annotated[list[Annotated[int, Ge(0)]], MinLen(1)]
GroupRule = Annotated[
    Annotated[Literal["block", "tensor", "row", "column", "learned"], Tag("kind")]
    | Annotated[dict[str, dict[Annotated[str, AfterValidator(_index_set)], Indices]], Tag("sets")],
    Discriminator(
        _group_kind,
        custom_error_type="group_rule",
        custom_error_message='must be one of "block" "tensor" "row" "column" "learned", or a table of index sets',
    ),
]
