"""What is wrong with a TOML file: pydantic's errors in our words, each with the keys that it concerns and a cure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from grpo_fed.scenario.toml.keys import all_keys, field_at, section_at, section_of_field
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.source import Source
from grpo_fed.scenario.toml.text import closest_match, explain_error, short_toml


@dataclass(frozen=True)
class Mistake:
    """Something wrong with one key, or a contradiction between several."""

    keys: tuple[KeyPath, ...]
    """The keys that are concerned. The mistake is reported at the first of them that the user wrote."""
    text: str
    """What is wrong and what to do, in words that fit each of the keys."""


def mistake_lines(source: Source, mistakes: list[Mistake]) -> list[str]:
    """Write a line for every mistake, in the order in which the user wrote the keys."""
    lines = []
    for mistake in mistakes:
        key = next((key for key in mistake.keys if source.has_key(key)), mistake.keys[0])
        lines.append((source.position_at(key), source.error_line(key, mistake.text)))
    return [line for _, line in sorted(lines, key=lambda item: item[0])]


def mistake_from_error(model: type[BaseModel], data: Any, error: ErrorDetails) -> Mistake:
    """Turn one of pydantic's errors about `data` into a mistake."""
    path = _written_path(data, error["loc"], is_missing=error["type"] == "missing")
    if error["type"] == "extra_forbidden":
        return Mistake((path,), _explain_unknown_key(model, path))
    if error["type"] == "missing":
        return Mistake((path,), f"missing; for example {path[-1]} = {short_toml(example_at(model, path))}")
    if error["type"] == "list_type" and section_at(model, path):
        return Mistake((path,), f"must be a list of tables: [[{path[-1]}]], in two brackets")
    return Mistake((path,), explain_error(error))


def section_errors(model: type[BaseModel], values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Explain what is wrong with values that are not in the user's file, such as those of a preset.

    values: section -> key -> value; each section is checked by itself.
    """
    for name, keys in values.items():
        info = model.model_fields.get(name)
        section = section_at(model, (name,))
        if info is None or info.is_required() or section is None or not isinstance(keys, Mapping):
            fields = model.model_fields.items()
            sections = [key for key, field in fields if section_of_field(field) and not field.is_required()]
            yield f"has {short_toml(name)}, which is not a section of keys and values; there are {' '.join(sections)}"
            continue
        try:
            section.model_validate(dict(keys))
        except ValidationError as invalid:
            for error in invalid.errors():
                key = ".".join(map(str, (name, *_written_path(keys, error["loc"], is_missing=False))))
                if error["type"] == "extra_forbidden":
                    yield f"has {key}: {_explain_unknown_key(model, (name, *error['loc']))}"
                else:
                    yield f"has {key} = {short_toml(error['input'])}: {explain_error(error)}"


def _written_path(data: Any, loc: tuple[str | int, ...], *, is_missing: bool) -> KeyPath:
    """Drop from pydantic's location what the user did not write: the tags of members of a union."""
    path: KeyPath = ()
    for depth, part in enumerate(loc, start=1):
        if part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int):
            data = data[part]
            path = (*path, part)
        elif is_missing and depth == len(loc):
            path = (*path, part)
    return path


def _explain_unknown_key(model: type[BaseModel], path: KeyPath) -> str:
    suggestion = suggest_key(model, path)
    if suggestion is None:
        section = section_at(model, path[:-1])
        known = f"known here: {' '.join(section.model_fields)}" if section else "remove it"
        return f"unknown key; {known}"
    if suggestion[:-1] == path[:-1]:
        return f"unknown key; did you mean {suggestion[-1]}?"
    if len(suggestion) == 1:
        return f"unknown key; {suggestion[0]} belongs at the top of the file, above the first [section]"
    return f"unknown key; did you mean {'.'.join(map(str, suggestion))}?"


def suggest_key(model: type[BaseModel], path: KeyPath) -> KeyPath | None:
    """Return the key that an unknown one probably means: the same name in another table, or a similar one in this."""
    section = section_at(model, path[:-1])
    last = path[-1]
    if section is None or not isinstance(last, str) or last in section.model_fields:
        return None
    same_name = next((key for key, _ in all_keys(model) if key[-1] == last), None)
    similar = closest_match(last, section.model_fields)
    return same_name or ((*path[:-1], similar) if similar else None)


def example_at(model: type[BaseModel], path: KeyPath) -> Any:
    """Return the example of a key that must be given."""
    info = field_at(model, path)
    assert info is not None
    assert info.examples, f"{path} must be given and has no example"
    return deepcopy(info.examples[0])
