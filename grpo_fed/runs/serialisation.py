"""Converts records to JSON and back, by their types.

A record is a dataclass. Its JSON is an object with its fields by name; reading it back checks every value against the
field's type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")


def to_json(value: Any) -> str:
    """Write records, and lists and mappings of them, as one line of JSON."""
    return json.dumps(value, default=vars)


def read_json(path: Path) -> Any:
    """Read a file of JSON; ValueError if it is none."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Parse JSON; ValueError if it is none, or nested too deeply to be any of ours."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_json(kind: type[Record], document: Any) -> Record:
    """Make a record of type `kind` from its JSON; ValueError names the field that does not fit."""
    try:
        record: Record = _adapter(kind).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"it has no {field}") from None
        raise ValueError(f"{field or kind.__name__} is {first['input']!r}: {first['msg'].lower()}") from None
    return record


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
"""A cache by type, since making an adapter takes longer than reading a record."""


def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
