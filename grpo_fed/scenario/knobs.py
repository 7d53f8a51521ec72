"""All knobs of a scenario as records, from the types and docs in settings.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.keys import all_keys
from grpo_fed.scenario.toml.text import short_toml

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Knob:
    """One key of a scenario."""

    section: str
    """Name of its table; empty for keys at the top of the file."""
    key: str
    """Name of the key in its table."""
    type: str
    """Type of the value, in words."""
    default: str
    """Default value as TOML writes it; empty if the key must be given or has no value by default."""
    limits: str
    """Limits of the value, such as `> 0`; empty if there are none."""
    doc: str
    """Meaning of the key."""


def list_knobs(model: type[BaseModel] = Scenario) -> list[Knob]:
    """List all knobs, in the order in which a file has them."""
    return [_knob(path, info) for path, info in all_keys(model)]


def _knob(path: tuple[str | int, ...], info: FieldInfo) -> Knob:
    *section, key = map(str, path)
    schema = TypeAdapter(_declared_type(info)).json_schema()
    return Knob(
        ".".join(section),
        key,
        _type_in_words(schema),
        _default(info),
        ", ".join(_limits(schema)),
        " ".join((info.description or "").split()),
    )


def _declared_type(info: FieldInfo) -> Any:
    """Return the type with which a field was declared, including its limits."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _default(info: FieldInfo) -> str:
    """Write the default as a file would have it."""
    if info.is_required():
        return ""
    value = TypeAdapter(_declared_type(info)).dump_python(info.get_default(call_default_factory=True))
    return "" if value is None else short_toml(value)


def _type_in_words(schema: Schema) -> str:
    if "enum" in schema:
        return " | ".join(short_toml(choice) for choice in schema["enum"])
    if "const" in schema:
        return short_toml(schema["const"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type_in_words(option) for option in options if option.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_type_in_words(schema.get('items', {}))}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"table of {_type_in_words(inner)}" if isinstance(inner, dict) and inner else "table"
    if "pattern" in schema:
        return "import path"
    names = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false"}
    return names.get(str(schema.get("type")), "anything")


def _limits(schema: Schema) -> Iterator[str]:
    """List the limits of a value, or of each item in it."""
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    for word, sign in signs.items():
        if word in schema:
            yield f"{sign} {short_toml(schema[word])}"
    for word in ("anyOf", "oneOf"):
        for option in schema.get(word, ()):
            yield from _limits(option)
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            yield from _limits(schema[word])
