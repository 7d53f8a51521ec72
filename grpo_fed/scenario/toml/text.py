"""Values as TOML writes them, and what is wrong with one, in plain words."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from datetime import date, time
from typing import Any

from pydantic_core import ErrorDetails

_LIMITS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} letters",
    "too_short": "must have {min_length} or more items; has {actual_length}",
    "too_long": "must have {max_length} items; has {actual_length}",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "list_type": "must be a list",
    "dict_type": "must be a table: {{ key = value, ... }}",
    "model_type": "must be a table: {{ key = value, ... }}",
}
"""For pydantic's types of errors, what would be right."""


def explain_error(error: ErrorDetails) -> str:
    """What is wrong with a value, from one of pydantic's errors."""
    context = error.get("ctx", {})
    if error["type"] == "value_error":
        return str(context["error"])
    if error["type"] == "literal_error":
        return _choice(error["input"], re.findall("'([^']*)'", context["expected"]))
    if error["type"] in _LIMITS:
        shown = {key: short_toml(value) for key, value in context.items()}
        return _LIMITS[error["type"]].format(**shown) + _instead(error["type"], error["input"])
    return error["msg"][:1].lower() + error["msg"][1:]


def _instead(kind: str, value: Any) -> str:
    """The same value as it should have been written, where that is plain."""
    match kind, value:
        case "float_type" | "int_type" | "bool_type", str() if re.fullmatch(r"[-+]?[0-9_.]+|true|false", value):
            return f": {value}, without quotes"
        case "string_type", int() | float() if not isinstance(value, bool):
            return f": {short_toml(str(value))}"
        case "list_type", str() | int() | float():
            return f": [{short_toml(value)}]"
        case _:
            return ""


def _choice(value: Any, choices: list[str]) -> str:
    close = closest_match(value, choices) if isinstance(value, str) else None
    listed = " ".join(short_toml(choice) for choice in choices)
    return f"must be one of {listed}{did_you_mean(short_toml(close) if close else None)}"


def did_you_mean(word: str | None) -> str:
    """The end of a sentence; empty if there is no such word."""
    return f"; did you mean {word}?" if word else ""


def suggest_name(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known one most like it, or else those that there are."""
    names = list(dict.fromkeys(known))
    close = closest_match(word, names)
    return did_you_mean(short_toml(close)) if close else f"; there are {short_toml(names)}"


def closest_match(word: str, known: Iterable[str]) -> str | None:
    """The known word most like this one, if one is like it."""
    by_lower = {other.lower().replace("-", "_"): other for other in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1)
    return by_lower[found[0]] if found else None


def short_toml(value: Any) -> str:
    """A value for people: as TOML writes it, of bearable length, 1 for 1.0."""
    return shorten(to_toml(value, number=lambda x: str(int(x)) if x.is_integer() and abs(x) < 1e6 else repr(x)))


def toml_key(key: str) -> str:
    """A part of a key as TOML writes it, in quotes where it needs them."""
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else to_toml(key)


def shorten(text: str, length: int = 100) -> str:
    """Text whose end is left out where it is too long."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def to_toml(value: Any, number: Callable[[float], str] = repr) -> str:
    """A value as TOML writes it on one line; `number` writes those with a fraction."""
    match value:
        case bool():
            return str(value).lower()
        case float():
            return number(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(to_toml(item, number) for item in value)}]"
        case dict() if value:
            return (
                f"{{ {', '.join(f'{toml_key(str(key))} = {to_toml(item, number)}' for key, item in value.items())} }}"
            )
        case dict():
            return "{}"
        case date() | time():
            return value.isoformat()
        case _:
            return str(value)
