"""TOML to a strict pydantic model: every mistake at once, each with its place, its value and its cure; and back.

It knows no scenario: `Scenario.load` hands it the model to read.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from grpo_fed.scenario.toml.lines import KeyPath
from grpo_fed.scenario.toml.source import ScenarioError as ScenarioError
from grpo_fed.scenario.toml.source import Source, read_text
from grpo_fed.scenario.toml.text import closest_match, explain_error, short_toml, to_toml, toml_key

Model = TypeVar("Model", bound=BaseModel)


PrepareTables: TypeAlias = Callable[[dict[str, Any], Sequence[str]], None]
"""Takes out of a file's tables what the overrides, as they were typed, leave no room for; ValueError if it cannot."""


def load(model: type[Model], path: str | FilePath, overrides: Sequence[str], make_way: PrepareTables) -> Model:
    """Reads a file, with `overrides` such as `objective.clip=0.3` on top of it; ScenarioError lists all mistakes."""
    return loads(model, read_text(FilePath(path)), str(path), overrides, make_way)


def loads(model: type[Model], text: str, name: str, overrides: Sequence[str], make_way: PrepareTables) -> Model:
    """Reads a TOML text; `name` stands for the file in errors."""
    given = Source.of(text, name)
    try:
        make_way(given.data, overrides)
    except ValueError as error:
        raise ScenarioError(f"{name}: {error}") from None
    wrong = [line for override in overrides if (line := given.set(override))]
    try:
        read = model.model_validate(given.data)
    except ValidationError as error:
        raise ScenarioError("\n".join([*wrong, *_lines(model, given, error.errors())])) from None
    if wrong:
        raise ScenarioError("\n".join(wrong))
    return read


def dumps(model: BaseModel) -> str:
    """All values as TOML, a table for each section; `loads` makes an equal model of it."""
    data = model.model_dump()
    tables = {name for name, info in type(model).model_fields.items() if _section(info)}
    parts = [_table("", {key: value for key, value in data.items() if key not in tables})]
    for name in (name for name in data if name in tables):
        if isinstance(data[name], list):
            parts += [_table(f"[[{name}]]\n", item) for item in data[name]]
        else:
            parts.append(_table(f"[{name}]\n", data[name]))
    return "\n".join(parts)


def _table(head: str, data: Mapping[str, Any]) -> str:
    """TOML has no None: what is not given is left out."""
    lines = (f"{toml_key(key)} = {to_toml(value)}\n" for key, value in data.items() if value is not None)
    return head + "".join(lines)


# Mistakes that only several keys make together ----------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """What is wrong between keys, in words that hold for each of them: it is told at the first that the user wrote."""

    keys: tuple[KeyPath, ...]
    text: str


def raise_mistakes(mistakes: Iterable[Mistake]) -> None:
    """For a model's validator: raises them all as one error, which `loads` takes apart again."""
    found = tuple(mistakes)
    if found:
        text = "; ".join(f"{'.'.join(map(str, mistake.keys[0]))}: {mistake.text}" for mistake in found)
        raise PydanticCustomError("mistakes", "{text}", {"text": text, "mistakes": found})


def section_errors(model: type[BaseModel], values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with values by section and key that stand outside a scenario, each judged by itself."""
    for name, keys in values.items():
        info = model.model_fields.get(name)
        section = section_at(model, (name,))
        if info is None or info.is_required() or section is None or not isinstance(keys, Mapping):
            known = [one for one, field in model.model_fields.items() if _section(field) and not field.is_required()]
            yield f"has {short_toml(name)}, which is no section with values by key; there are {' '.join(known)}"
            continue
        try:
            section.model_validate(dict(keys))
        except ValidationError as error:
            for one in error.errors():
                where = ".".join(map(str, (name, *_written(keys, one["loc"], missing=False))))
                if one["type"] == "extra_forbidden":
                    yield f"has {where}: {_unknown(model, (name, *one['loc']))}"
                else:
                    yield f"has {where} = {short_toml(one['input'])}: {explain_error(one)}"


# What is wrong with it ----------------------------------------------------------------------------------------------


def _lines(model: type[BaseModel], given: Source, errors: Sequence[ErrorDetails]) -> list[str]:
    """A line for every mistake, in the order in which the user wrote."""
    single = [_mistake(model, given, error) for error in errors if error["type"] != "mistakes"]
    joint = _joint(errors) or _contradictions_without_invalid_keys(model, given, single)
    lines = []
    for mistake in [*single, *joint]:
        key = next((key for key in mistake.keys if given.has(key)), mistake.keys[0])
        lines.append((given.position(key), given.line(key, mistake.text)))
    return [line for _, line in sorted(lines, key=lambda item: item[0])]


def _mistake(model: type[BaseModel], given: Source, error: ErrorDetails) -> Mistake:
    """One of pydantic's errors in our words."""
    path = _written(given.data, error["loc"], missing=error["type"] == "missing")
    if error["type"] == "extra_forbidden":
        return Mistake((path,), _unknown(model, path))
    if error["type"] == "missing":
        return Mistake((path,), f"missing; for example {path[-1]} = {short_toml(_example(model, path))}")
    if error["type"] == "list_type" and section_at(model, path):
        return Mistake((path,), f"must be a list of tables: [[{path[-1]}]], in two brackets")
    return Mistake((path,), explain_error(error))


def _written(data: Any, loc: tuple[str | int, ...], missing: bool) -> KeyPath:
    """What pydantic says of a place, without the tags of union members, which the user did not write."""
    path: KeyPath = ()
    for depth, part in enumerate(loc, start=1):
        if part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int):
            data = data[part]
            path = (*path, part)
        elif missing and depth == len(loc):
            path = (*path, part)
    return path


def _joint(errors: Sequence[ErrorDetails]) -> list[Mistake]:
    return [mistake for error in errors if error["type"] == "mistakes" for mistake in error["ctx"]["mistakes"]]


def _contradictions_without_invalid_keys(
    model: type[BaseModel], given: Source, single: Sequence[Mistake]
) -> list[Mistake]:
    """What is wrong between keys, when single ones are wrong too and so pydantic did not get to look at the whole.

    The wrong ones are left out; what depends on one of them cannot be judged and is not reported.
    """
    wrong = sorted({_knob_of(model, mistake.keys[0]) for mistake in single}, key=len)
    unsure = [*wrong, *(meant for knob in wrong if (meant := _suggested_key(model, knob)))]
    data = deepcopy(given.data)
    for number, knob in enumerate(wrong):
        if not any(_overlap(knob, other) for other in wrong[:number]):
            _leave_out(model, data, knob)
    try:
        model.model_validate(data)
    except ValidationError as error:
        joint = _joint(error.errors())
        return [j for j in joint if not any(_overlap(key, other) for key in j.keys for other in unsure)]
    return []


def _overlap(a: KeyPath, b: KeyPath) -> bool:
    """Whether one is the other or inside it."""
    length = min(len(a), len(b))
    return a[:length] == b[:length]


def _knob_of(model: type[BaseModel], path: KeyPath) -> KeyPath:
    """The knob that a path is or leads into: `("policy", "hidden")` for the second of its sizes."""
    section: type[BaseModel] | None = model
    knob = path
    for depth, part in enumerate(path, start=1):
        if section is None:
            break
        if isinstance(part, str):
            knob = path[:depth]
            section = section_at(model, knob)
    return knob


def _leave_out(model: type[BaseModel], data: Any, knob: KeyPath) -> None:
    """Takes a value out, or puts an example where there must be one."""
    *above, last = knob
    for part in above:
        data = data[part]
    info = _field(model, knob)
    if info is not None and info.is_required():
        data[last] = _example(model, knob)
    else:
        del data[last]


def _unknown(model: type[BaseModel], path: KeyPath) -> str:
    """What an unknown key may have meant."""
    meant = _suggested_key(model, path)
    if meant is None:
        section = section_at(model, path[:-1])
        return f"unknown key; known here: {' '.join(section.model_fields if section else ())}"
    if meant[:-1] == path[:-1]:
        return f"unknown key; did you mean {meant[-1]}?"
    if len(meant) == 1:
        return f"unknown key; {meant[0]} belongs at the top of the file, above the first [section]"
    return f"unknown key; did you mean {'.'.join(map(str, meant))}?"


def _suggested_key(model: type[BaseModel], path: KeyPath) -> KeyPath | None:
    """The known key that an unknown one is most like: of the same name in another table, or alike in the same."""
    section = section_at(model, path[:-1])
    last = path[-1]
    if section is None or not isinstance(last, str) or last in section.model_fields:
        return None
    elsewhere = next((knob for knob, _ in all_keys(model) if knob[-1] == last), None)
    close = closest_match(last, section.model_fields)
    return elsewhere or ((*path[:-1], close) if close else None)


def _example(model: type[BaseModel], knob: KeyPath) -> Any:
    """Of a value that must be given."""
    info = _field(model, knob)
    assert info is not None
    assert info.examples, f"{knob} must be given and has no example"
    return deepcopy(info.examples[0])


# The keys of a model ------------------------------------------------------------------------------------------------


def all_keys(model: type[BaseModel], above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every key of a model and of the sections in it; the model's own first, as TOML wants it."""
    fields = sorted(model.model_fields.items(), key=lambda field: _section(field[1]) is not None)
    for name, info in fields:
        if section := _section(info):
            yield from all_keys(section, (*above, name))
        else:
            yield (*above, name), info


def _field(model: type[BaseModel], knob: KeyPath) -> FieldInfo | None:
    section = section_at(model, knob[:-1])
    return section.model_fields.get(str(knob[-1])) if section else None


def section_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The model of the table at a path, if there is one."""
    section: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, str) and section:
            info = section.model_fields.get(part)
            section = _section(info) if info else None
    return section


def _section(info: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds, alone or in a list."""
    kind: Any = info.annotation
    while typing.get_origin(kind) in (typing.Annotated, list, types.UnionType):
        kind = typing.get_args(kind)[0]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
