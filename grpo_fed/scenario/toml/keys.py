"""The keys of a model whose fields are sections: `("objective", "clip")` leads to one of them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grpo_fed.scenario.toml.lines import KeyPath


def all_keys(model: type[BaseModel], above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """List every key of a model and of its sections, the model's own keys first, as TOML requires.

    above: the path of the section that `model` describes.
    """
    fields = sorted(model.model_fields.items(), key=lambda field: section_of_field(field[1]) is not None)
    for name, info in fields:
        if section := section_of_field(info):
            yield from all_keys(section, (*above, name))
        else:
            yield (*above, name), info


def section_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """Return the model of the table at a path; None if there is no table."""
    section: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, str) and section:
            info = section.model_fields.get(part)
            section = section_of_field(info) if info else None
    return section


def section_is_list(model: type[BaseModel], path: KeyPath) -> bool:
    """Whether the section at a path is a list of tables."""
    info = field_at(model, path)
    return info is not None and typing.get_origin(info.annotation) is list


def field_at(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """Return the field that a path names; None if the model has no such key."""
    section = section_at(model, path[:-1])
    return section.model_fields.get(str(path[-1])) if section else None


def section_of_field(info: FieldInfo) -> type[BaseModel] | None:
    """Return the model that a field holds, alone or in a list; None if it holds a plain value."""
    annotation: Any = info.annotation
    while typing.get_origin(annotation) in (typing.Annotated, list, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def key_containing(model: type[BaseModel], path: KeyPath) -> KeyPath:
    """Return the key that a path is or leads into: `("policy", "hidden")` for the second of the hidden sizes."""
    section: type[BaseModel] | None = model
    key = path
    for depth, part in enumerate(path, start=1):
        if section is None:
            break
        if isinstance(part, str):
            key = path[:depth]
            section = section_at(model, key)
    return key


def paths_overlap(a: KeyPath, b: KeyPath) -> bool:
    """Whether two paths are the same, or one of them lies inside the other."""
    length = min(len(a), len(b))
    return a[:length] == b[:length]
