"""Rows of the tables of methods and presets: ours are found by name, a user's own by an import path `module:NAME`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from grpo_fed.scenario.importing import import_object
from grpo_fed.scenario.toml.keys import all_keys
from grpo_fed.scenario.toml.text import short_toml

Values = Mapping[str, Mapping[str, Any]]
"""Section -> key -> value."""


class TableRow(Protocol):
    """What rows of all tables have in common."""

    @property
    def name(self) -> str:
        """The full name, in words."""

    @property
    def paper(self) -> str:
        """The source: a paper and whose values these are."""

    @property
    def values(self) -> Values:
        """The values for keys that a scenario does not give."""


AnyRow = TypeVar("AnyRow", bound=TableRow)


def is_import_path(name: object) -> bool:
    """Whether a name is the import path of something of the user's own."""
    return isinstance(name, str) and ":" in name


def find_row(name: object, table: Mapping[str, AnyRow], kind: type[AnyRow]) -> AnyRow | None:
    """Find a row by its name in our table, or import a user's own; None if our table has no such name.

    ValueError if an import path does not lead to a row of this kind.
    """
    if not isinstance(name, str):
        return None
    if not is_import_path(name):
        return table.get(name)
    row = import_object(name)
    if not isinstance(row, kind):
        raise ValueError(f"is a {type(row).__name__}; it must be a {kind.__module__}.{kind.__name__}")
    return row


def find_row_or_none(name: object, table: Mapping[str, AnyRow], kind: type[AnyRow]) -> AnyRow | None:
    """Find a row as `find_row` does; None also for a row that cannot be imported on this machine."""
    try:
        return find_row(name, table, kind)
    except ValueError:
        return None


def fill_missing(data: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """Add values to a scenario's tables for the keys that they do not have; a section that is not a table stays."""
    tables = {section: data.get(section, {}) for section in values}
    filled = {section: {**values[section], **table} for section, table in tables.items() if isinstance(table, Mapping)}
    return {**data, **filled}


def is_complete(model: type[BaseModel], tables: Mapping[str, Collection[str]]) -> bool:
    """Whether every key is given, as in a resolved scenario, so that no row is needed and none has to be importable.

    tables: section -> the keys that are given in it.
    """
    keys = ((path, info) for path, info in all_keys(model) if len(path) == 2 and path[0] not in ("clients", "sites"))
    return all(
        path[1] in tables.get(str(path[0]), ()) or info.default is None  # for which TOML may have no spelling
        for path, info in keys
    )


def as_toml_lines(values: Values) -> list[str]:
    """Write values as a scenario would have them, `section.key = value`; None is written `inf`, no limit."""
    return [
        f"{section}.{key} = {'inf' if value is None else short_toml(value)}"
        for section, keys in values.items()
        for key, value in keys.items()
    ]
