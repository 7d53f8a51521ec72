"""Rows of the tables of presets and of methods: ours by their names, a user's own by `module:NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from grpo_fed.scenario.importing import import_object
from grpo_fed.scenario.toml.text import short_toml

Values = Mapping[str, Mapping[str, Any]]
"""Section -> key -> value."""


class TableRow(Protocol):
    """What a table has many of."""

    @property
    def name(self) -> str:
        """In words."""

    @property
    def paper(self) -> str:
        """Where it comes from."""

    @property
    def values(self) -> Values:
        """What it says for keys that a scenario leaves open."""


AnyRow = TypeVar("AnyRow", bound=TableRow)


def is_import_path(name: object) -> bool:
    """Whether it is a user's, by an import path."""
    return isinstance(name, str) and ":" in name


def find_row(name: object, table: Mapping[str, AnyRow], kind: type[AnyRow]) -> AnyRow | None:
    """The row of this name; None for what names none. ValueError for an import path that leads to no such row."""
    if not isinstance(name, str):
        return None
    if not is_import_path(name):
        return table.get(name)
    row = import_object(name)
    if not isinstance(row, kind):
        raise ValueError(f"is a {type(row).__name__}; it must be a {kind.__module__}.{kind.__name__}")
    return row


def find_row_or_none(name: object, table: Mapping[str, AnyRow], kind: type[AnyRow]) -> AnyRow | None:
    """As `find`; None too for a row that cannot be imported here."""
    try:
        return find_row(name, table, kind)
    except ValueError:
        return None


def fill_missing(data: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A scenario's tables with these values for the keys that they leave open; what is not a table stays as it is."""
    tables = {section: data.get(section, {}) for section in values}
    return {**data, **{key: {**values[key], **given} for key, given in tables.items() if isinstance(given, Mapping)}}


def as_toml_lines(values: Values) -> list[str]:
    """As a scenario would have them, `section.key = value`; None is no limit."""
    return [
        f"{section}.{key} = {'inf' if value is None else short_toml(value)}"
        for section, keys in values.items()
        for key, value in keys.items()
    ]
