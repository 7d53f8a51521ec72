"""Records to JSON and back, by their types.

A record is a frozen dataclass. Its JSON is its fields by name, so that a file can be read by anyone; reading it back
checks every value against the field's type.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")


def to_json(value: Any) -> str:
    """Write records, and lists and tables of them, as one line of JSON."""
    return json.dumps(value, default=vars)


def from_json(kind: type[Record], document: Any) -> Record:
    """Make a record of type `kind` from what JSON has of it; ValueError names the field that does not fit."""
    try:
        record: Record = _adapter(kind).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field or kind.__name__}: {first['msg']}") from None
    return record


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
"""By type: making an adapter takes longer than reading a record."""


def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
