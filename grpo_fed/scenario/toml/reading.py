"""From TOML to a strict pydantic model, reporting every mistake at once with its place, value and cure; and back.

It knows nothing of scenarios: `Scenario.load` passes the model, what to do with the tables before they are read, and
the function that finds contradictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from grpo_fed.scenario.toml.keys import field_at, key_containing, paths_overlap, section_of_field
from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.mistakes import Mistake, example_at, mistake_from_error, mistake_lines, suggest_key
from grpo_fed.scenario.toml.source import ScenarioError, Source, read_text
from grpo_fed.scenario.toml.text import to_toml, toml_key

Model = TypeVar("Model", bound=BaseModel)

PrepareTables: TypeAlias = Callable[[dict[str, Any], Sequence[str]], None]
"""Removes values from a file's tables that the overrides replace; ValueError if it cannot know which."""
FindContradictions: TypeAlias = Callable[[Model], Iterable[Mistake]]
"""Finds the contradictions between the keys of a valid model."""

MOST_MISTAKES = 100
"""Mistakes that are explained; a file with more is hardly a scenario, and to guess what was meant takes time."""
CONTRADICTIONS_LATER = object()
"""The validation context under which a model accepts contradictions, since its caller looks for them afterwards."""


def load(
    model: type[Model],
    path: str | Path,
    overrides: Sequence[str],
    prepare: PrepareTables,
    contradictions: FindContradictions[Model],
) -> Model:
    """Read a file, with overrides such as `objective.clip=0.3` on top of it; ScenarioError lists all mistakes."""
    return loads(model, read_text(Path(path)), str(path), overrides, prepare, contradictions)


def loads(
    model: type[Model],
    text: str,
    name: str,
    overrides: Sequence[str],
    prepare: PrepareTables,
    contradictions: FindContradictions[Model],
) -> Model:
    """Read a TOML text; ScenarioError lists all mistakes.

    name: stands for the file in errors.
    """
    source, lines = read_source(text, name, overrides, prepare)
    try:
        value = model.model_validate(source.data, context=CONTRADICTIONS_LATER)
    except ValidationError as invalid:
        errors = invalid.errors()
        mistakes = [mistake_from_error(model, source.data, error) for error in errors[:MOST_MISTAKES]]
        more = len(errors) - len(mistakes)
        if not more:
            mistakes += _contradictions_without_invalid_keys(model, source.data, mistakes, contradictions)
        rest = [f"{name}: has {more:,} more mistakes"] if more else []
        raise ScenarioError("\n".join([*lines, *mistake_lines(source, mistakes), *rest])) from None
    lines += mistake_lines(source, list(contradictions(value)))
    if lines:
        raise ScenarioError("\n".join(lines))
    return value


def read_source(text: str, name: str, overrides: Sequence[str], prepare: PrepareTables) -> tuple[Source, list[str]]:
    """Parse a TOML text and put overrides on top of it; return a line of error for each that cannot be applied.

    ScenarioError if the text is not TOML, or if it cannot be known which of its values the overrides replace.
    """
    source = Source.parse(text, name)
    try:
        prepare(source.data, overrides)
    except ValueError as error:
        raise ScenarioError(f"{name}: {error}") from None
    return source, [line for override in overrides if (line := source.apply_override(override))]


def _contradictions_without_invalid_keys(
    model: type[Model], data: dict[str, Any], invalid: Sequence[Mistake], contradictions: FindContradictions[Model]
) -> Iterator[Mistake]:
    """Find contradictions although some keys are invalid, so that the user sees all mistakes at once.

    The invalid keys are left out for this. A contradiction that involves one of them, or the key that a misspelt one
    probably means, cannot be judged and is not reported.
    """
    invalid_keys = sorted({key_containing(model, mistake.keys[0]) for mistake in invalid}, key=len)
    probably_meant = [suggestion for key in invalid_keys if (suggestion := suggest_key(model, key))]
    data = deepcopy(data)
    for number, key in enumerate(invalid_keys):
        if not any(paths_overlap(key, removed) for removed in invalid_keys[:number]):
            _remove_key(model, data, key)
    try:
        value = model.model_validate(data, context=CONTRADICTIONS_LATER)
    except ValidationError:
        return
    unsure = [*invalid_keys, *probably_meant]
    for mistake in contradictions(value):
        if not any(paths_overlap(key, other) for key in mistake.keys for other in unsure):
            yield mistake


def _remove_key(model: type[BaseModel], data: Any, key: KeyPath) -> None:
    """Remove a value, or replace it by an example if it must be given."""
    *above, last = key
    for part in above:
        data = data[part]
    info = field_at(model, key)
    if info is not None and info.is_required():
        data[last] = example_at(model, key)
    else:
        del data[last]


def dumps(model: BaseModel) -> str:
    """Write all values as TOML, a table for each section; `loads` makes an equal model of it."""
    data = model.model_dump()
    sections = {name for name, info in type(model).model_fields.items() if section_of_field(info)}
    parts = [_table("", {key: value for key, value in data.items() if key not in sections})]
    for name in (name for name in data if name in sections):
        if isinstance(data[name], list):
            parts += [_table(f"[[{name}]]\n", item) for item in data[name]]
        else:
            parts.append(_table(f"[{name}]\n", data[name]))
    return "\n".join(parts)


def _table(head: str, data: Mapping[str, Any]) -> str:
    """Write a table without the keys that are None, which TOML does not have."""
    lines = (f"{toml_key(key)} = {to_toml(value)}\n" for key, value in data.items() if value is not None)
    return head + "".join(lines)
