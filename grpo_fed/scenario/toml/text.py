"""Writes values as TOML, and explains in plain words what is wrong with one."""

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
    "string_too_long": "must have at most {max_length} characters",
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
"""The requirement behind each of pydantic's types of error."""


def explain_error(error: ErrorDetails) -> str:
    """Explain one of pydantic's errors about a value."""
    context = error.get("ctx", {})
    if error["type"] == "value_error":
        return str(context["error"])
    if error["type"] == "literal_error":
        return _explain_choice(error["input"], re.findall("'([^']*)'", context["expected"]))
    if error["type"] in _LIMITS:
        limits = {key: short_toml(value) for key, value in context.items()}
        return _LIMITS[error["type"]].format(**limits) + _corrected(error["type"], error["input"])
    return error["msg"][:1].lower() + error["msg"][1:]


def _corrected(error_type: str, value: Any) -> str:
    """Write the value as it was probably meant, where that is plain."""
    match error_type, value:
        case "float_type" | "int_type" | "bool_type", str() if re.fullmatch(r"[-+]?[0-9_.]+|true|false", value):
            return f": {value}, without quotes"
        case "string_type", int() | float() if not isinstance(value, bool):
            return f": {short_toml(str(value))}"
        case "list_type", str() | int() | float():
            return f": [{short_toml(value)}]"
        case _:
            return ""


def _explain_choice(value: Any, choices: list[str]) -> str:
    similar = closest_match(value, choices) if isinstance(value, str) else None
    listed = " ".join(short_toml(choice) for choice in choices)
    return f"must be one of {listed}{did_you_mean(short_toml(similar) if similar else None)}"


def did_you_mean(word: str | None) -> str:
    """Write the end of an error message that suggests a word; empty if there is no word."""
    return f"; did you mean {word}?" if word else ""


def suggest_name(word: str, known: Iterable[str]) -> str:
    """Write the end of an error message about an unknown name: the most similar known name, or else all of them."""
    names = list(dict.fromkeys(known))
    similar = closest_match(word, names)
    return did_you_mean(short_toml(similar)) if similar else f"; there are {short_toml(names)}"


def closest_match(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar to this one; None if none is similar."""
    originals = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    matches = difflib.get_close_matches(word.lower().replace("-", "_"), originals, n=1)
    return originals[matches[0]] if matches else None


def short_toml(value: Any) -> str:
    """Write a value for people to read: as TOML, shortened, and 1 for 1.0."""
    return shorten(to_toml(value, number=lambda x: str(int(x)) if x.is_integer() and abs(x) < 1e6 else repr(x)))


def toml_key(key: str) -> str:
    """Write a part of a key as TOML, in quotes where it needs them."""
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else to_toml(key)


def shorten(text: str, length: int = 100) -> str:
    """Cut off the end of a text that is too long."""
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def to_toml(value: Any, number: Callable[[float], str] = repr) -> str:
    """Write a value as TOML on one line.

    number: writes a float.
    """
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
            given = {key: item for key, item in value.items() if item is not None}  # TOML has no None
            return (
                f"{{ {', '.join(f'{toml_key(str(key))} = {to_toml(item, number)}' for key, item in given.items())} }}"
            )
        case dict():
            return "{}"
        case date() | time():
            return value.isoformat()
        case _:
            return str(value)
